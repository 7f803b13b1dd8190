"""The language of prose: py3langid (Lui and Baldwin 2012; Barbaresi 2022), whose model is in its wheel.

Only labels of ISO 639-1 are candidates. The first 2,000 characters decide: the score falls with the length anyway, and
reading all of a long document costs more than every other signal. Text without letters, or without any feature of the
model, has no language.
"""

from __future__ import annotations

import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SAMPLE_CHARACTERS = 2000


@functools.cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Its label for text that is no language at all ("zxx") competes too, so that digits are not forced into one.
    identifier.set_languages([label for label in identifier.labels if len(label) == 2 or label == "zxx"])
    return identifier


def language(text: str) -> tuple[str | None, float | None]:
    """ISO 639-1 code and the identifier's probability; (None, None) when the text has no language."""
    identifier = _identifier()
    label, score = identifier.classify(text[:SAMPLE_CHARACTERS])
    # Without any feature all labels score alike; one of two scripts (sr) has twice that.
    if label == "zxx" or score < 3 / len(identifier.labels):
        return None, None
    return str(label), float(score)
