"""What a file is, by its name and, for a name without extension, its shebang: language, kind, media type.

Names are those of GitHub's linguist in lower case; its types decide the kind: prose is `text`; programming, markup and
data languages are `code`. What no table knows is plain text. Left out: a look at the content beyond the first line, so
an extension that several languages share (.h, .m, .v) goes to the commonest of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "code"]
Type = Literal["programming", "markup", "data", "prose"]


@dataclass(frozen=True, slots=True)
class Language:
    """A language of linguist's: its name in lower case, its type, the media type of its files."""

    name: str
    type: Type
    media_type: str

    @property
    def kind(self) -> Kind:
        return "text" if self.type == "prose" else "code"


TEXT = Language("text", "prose", "text/plain")

# name | media type | extensions | names without extension that are of it | interpreters
_TABLE: dict[Type, str] = {
    "prose": """
        text | text/plain | .txt .text .log |
        markdown | text/markdown | .md .markdown .mdown .mkd .mdx |
        restructuredtext | text/x-rst | .rst .rest |
        asciidoc | text/asciidoc | .adoc .asciidoc |
        org | text/org | .org |
        textile | text/x-textile | .textile |
        pod | text/x-pod | .pod |
    """,
    "programming": """
        python | text/x-python | .py .pyi .pyw .pyx .pxd .gyp | sconstruct sconscript wscript | python pypy
        c | text/x-c | .c .h |
        c++ | text/x-c++ | .cc .cpp .cxx .c++ .hh .hpp .hxx .h++ .ipp .tpp .inl |
        cuda | text/x-cuda | .cu .cuh |
        c# | text/x-csharp | .cs .csx |
        java | text/x-java | .java |
        javascript | text/javascript | .js .cjs .mjs .jsx | jakefile | node nodejs
        typescript | text/x-typescript | .ts .cts .mts | | deno ts-node bun
        tsx | text/x-tsx | .tsx |
        coffeescript | text/x-coffeescript | .coffee | cakefile | coffee
        go | text/x-go | .go |
        rust | text/x-rust | .rs |
        swift | text/x-swift | .swift |
        objective-c | text/x-objective-c | .m |
        objective-c++ | text/x-objective-c++ | .mm |
        kotlin | text/x-kotlin | .kt .kts |
        scala | text/x-scala | .scala .sc .sbt | | scala
        groovy | text/x-groovy | .groovy | jenkinsfile | groovy
        gradle | text/x-groovy | .gradle |
        clojure | text/x-clojure | .clj .cljs .cljc .edn |
        ruby | text/x-ruby | .rb .rake .gemspec .ru | rakefile gemfile vagrantfile podfile brewfile | ruby
        perl | text/x-perl | .pl .pm .t | | perl
        php | application/x-php | .php .phtml | | php
        lua | text/x-lua | .lua | | lua luajit
        r | text/x-r | .r | .rprofile | rscript
        julia | text/x-julia | .jl | | julia
        fortran | text/x-fortran | .f .for .f77 |
        fortran free form | text/x-fortran | .f90 .f95 .f03 .f08 |
        haskell | text/x-haskell | .hs | | runhaskell
        ocaml | text/x-ocaml | .ml .mli | | ocaml
        f# | text/x-fsharp | .fs .fsi .fsx |
        erlang | text/x-erlang | .erl .hrl | | escript
        elixir | text/x-elixir | .ex .exs | | elixir
        dart | text/x-dart | .dart |
        zig | text/x-zig | .zig |
        nim | text/x-nim | .nim |
        d | text/x-d | .d |
        ada | text/x-ada | .adb .ads |
        pascal | text/x-pascal | .pas .pp |
        common lisp | text/x-common-lisp | .lisp .lsp .cl | | sbcl
        emacs lisp | text/x-emacs-lisp | .el | .emacs
        scheme | text/x-scheme | .scm .ss | | guile
        racket | text/x-racket | .rkt | | racket
        prolog | text/x-prolog | .pro .prolog | | swipl
        tcl | text/x-tcl | .tcl .tm | | tclsh wish
        assembly | text/x-asm | .asm .s .nasm |
        verilog | text/x-verilog | .v .vh |
        systemverilog | text/x-systemverilog | .sv .svh |
        vhdl | text/x-vhdl | .vhd .vhdl |
        glsl | text/x-glsl | .glsl .vert .frag |
        hlsl | text/x-hlsl | .hlsl |
        shell | application/x-sh | .sh .bash .zsh .ksh .bats | .bashrc .profile .zshrc | sh bash zsh dash ksh ash
        fish | text/x-fish | .fish | | fish
        powershell | text/x-powershell | .ps1 .psm1 .psd1 | | pwsh
        batchfile | text/x-batch | .bat .cmd |
        awk | text/x-awk | .awk | | awk gawk mawk
        sed | text/x-sed | .sed | | sed
        vim script | text/x-vim | .vim | .vimrc
        makefile | text/x-makefile | .mk .mak .make | makefile gnumakefile makefile.am makefile.in | make
        cmake | text/x-cmake | .cmake | cmakelists.txt
        meson | text/x-meson | | meson.build meson.options
        starlark | text/x-starlark | .bzl .star | build.bazel workspace
        m4 | text/x-m4 | .m4 |
        m4sugar | text/x-m4 | | configure.ac configure.in
        dockerfile | text/x-dockerfile | .dockerfile | dockerfile containerfile
        hcl | text/x-hcl | .hcl .tf .tfvars |
        nix | text/x-nix | .nix |
        jsonnet | text/x-jsonnet | .jsonnet .libsonnet |
        sql | application/sql | .sql |
        plpgsql | application/sql | .pgsql |
        cython | text/x-cython | |
        solidity | text/x-solidity | .sol |
        webassembly | text/x-wat | .wat .wast |
        gdscript | text/x-gdscript | .gd |
        qml | text/x-qml | .qml |
        lean | text/x-lean | .lean |
        agda | text/x-agda | .agda |
        yacc | text/x-yacc | .y .yy |
        lex | text/x-lex | .l .lex |
        antlr | text/x-antlr | .g4 |
        matlab | text/x-matlab | .matlab |
    """,
    "markup": """
        html | text/html | .html .htm .xhtml |
        css | text/css | .css |
        scss | text/x-scss | .scss |
        sass | text/x-sass | .sass |
        less | text/x-less | .less |
        tex | application/x-tex | .tex .sty .cls .ltx |
        roff | text/troff | .roff .man .1 .3 .5 .8 |
        vue | text/x-vue | .vue |
        svelte | text/x-svelte | .svelte |
        astro | text/x-astro | .astro |
        jinja | text/x-jinja | .j2 .jinja .jinja2 |
        mustache | text/x-mustache | .mustache |
        handlebars | text/x-handlebars | .hbs .handlebars |
        erb | text/x-erb | .erb |
        pug | text/x-pug | .pug .jade |
        postscript | application/postscript | .ps .eps |
        rmarkdown | text/markdown | .rmd .qmd |
        bibtex | text/x-bibtex | .bib |
        texinfo | application/x-texinfo | .texi .texinfo |
        gettext catalog | text/x-gettext | .po .pot |
    """,
    "data": """
        json | application/json | .json .webmanifest .tfstate | .arcconfig composer.lock pipfile.lock
        json with comments | application/json | .jsonc .code-workspace | .eslintrc.json tsconfig.json .babelrc
        json5 | application/json5 | .json5 |
        jsonld | application/ld+json | .jsonld |
        geojson | application/geo+json | .geojson |
        yaml | application/yaml | .yaml .yml | .clang-format .clang-tidy
        toml | application/toml | .toml | cargo.lock pipfile poetry.lock uv.lock
        ini | text/x-ini | .ini .cfg .conf .prefs | .editorconfig .flake8 .gitconfig .pylintrc
        java properties | text/x-java-properties | .properties |
        dotenv | text/x-dotenv | | .env
        xml | application/xml | .xml .xsd .xsl .xslt .wsdl .rss .plist .csproj .vcxproj .ui |
        svg | image/svg+xml | .svg |
        csv | text/csv | .csv |
        tsv | text/tab-separated-values | .tsv .tab |
        protocol buffer | text/x-protobuf | .proto |
        thrift | text/x-thrift | .thrift |
        graphql | application/graphql | .graphql .gql |
        diff | text/x-diff | .diff .patch |
        ignore list | text/plain | | .gitignore .dockerignore .npmignore .eslintignore .prettierignore
        git attributes | text/plain | | .gitattributes .mailmap
        pip requirements | text/plain | | requirements.txt requirements-dev.txt constraints.txt
        jupyter notebook | application/x-ipynb+json | .ipynb |
        go module | text/x-go-mod | .mod |
        go checksums | text/plain | .sum |
        turtle | text/turtle | .ttl |
    """,
}


def _load() -> tuple[dict[str, Language], dict[str, Language], dict[str, Language]]:
    extensions: dict[str, Language] = {}
    names: dict[str, Language] = {}
    interpreters: dict[str, Language] = {}
    for type_, rows in _TABLE.items():
        for row in rows.strip().splitlines():
            cells = [cell.strip() for cell in row.split("|")]
            language = TEXT if cells[0] == TEXT.name else Language(cells[0], type_, cells[1])
            for table, cell in zip((extensions, names, interpreters), cells[2:], strict=False):
                for key in cell.split():
                    assert key not in table, f"{key} stands twice in the table of languages"
                    table[key] = language
    return extensions, names, interpreters


_EXTENSIONS, _NAMES, _INTERPRETERS = _load()
_SHEBANG = re.compile(r"#!\s*(\S+)((?:[ \t]+\S+)*)")


def extension(name: str) -> str:
    """The last extension of a file's name in lower case with its dot, empty where it has none (`.bashrc` has none)."""
    stem, dot, last = name.rsplit("/", 1)[-1].rpartition(".")
    return (dot + last).lower() if stem.strip(".") and last else ""


def interpreter(first_line: str) -> str | None:
    """The interpreter that a shebang names, version numbers off, `env` and its options looked through."""
    match = _SHEBANG.match(first_line)
    if match is None:
        return None
    words = [match[1].rsplit("/", 1)[-1], *match[2].split()]
    if words[0] == "env":
        words = [w.rsplit("/", 1)[-1] for w in words[1:] if not w.startswith("-") and "=" not in w]
    return words[0].lower().rstrip("0123456789.-") or None if words else None


def detect(name: str, first_line: str = "") -> Language:
    """The language of a file: by its whole name, then its extension, then, for no extension, its first line's shebang.

    Args:
        name: the file's name or path; only the last part is looked at, without regard to case.
        first_line: the file's first line; needed only for names without extension.
    """
    base = name.rsplit("/", 1)[-1].lower()
    ending = extension(base)
    by_name = _NAMES.get(base) or _EXTENSIONS.get(ending)
    if by_name is not None:
        return by_name
    if not ending:
        program = interpreter(first_line)
        if program is not None:
            return _INTERPRETERS.get(program, TEXT)
    return TEXT


def code_language(name: str, text: str = "") -> str | None:
    """Linguist's name in lower case for what is code; None for prose and what no table knows."""
    language = detect(name, text[:256].split("\n", 1)[0])
    return language.name if language.kind == "code" else None
