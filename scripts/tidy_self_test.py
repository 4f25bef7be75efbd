"""The checks of scripts/tidy on small files that each break one rule, and on files that break none.

Run as `scripts/tidy --self-test`.
"""

OPEN = "//! One thing.\n"
ATOMIC = "static A: AtomicU64 = z();\n"
UNWRAP = "fn a() { b().unwrap() }\n"
LONG = "fn long() {\n" + "    step();\n" * 70 + "}\n"
# Put together here so that this file does not hold the words that it tests.
WORK_IN_PROGRESS = "TO" + "DO"
HOME = "/ho" + "me/someone/x"

# (name, files, rules expected, in order)
CASES = [
    ("clean", {"codec/src/a.rs": OPEN + "fn a() {}\n"}, []),
    ("opening", {"codec/src/a.rs": "fn a() {}\n"}, ["opening"]),
    ("width", {"codec/src/a.rs": OPEN + "// " + "x" * 98 + "\n"}, ["width"]),
    ("wire text", {"codec/src/a.rs": OPEN + 'const A: &str = r#"' + "x" * 98 + '"#;\n'}, []),
    ("width counts characters", {"a.txt": "é" * 100 + "\n"}, []),
    ("tab", {"a.txt": "a\tb\n"}, ["tab"]),
    ("blank", {"a.txt": "a \n"}, ["blank"]),
    ("newline", {"a.txt": "a"}, ["newline"]),
    ("function of 72 lines", {"codec/src/a.rs": OPEN + LONG}, ["function-size"]),
    ("file of 700 lines", {"codec/src/a.rs": OPEN + "// x\n" * 700}, ["file-size"]),
    (
        "tests do not count",
        {"codec/src/a.rs": OPEN + "#[cfg(test)]\nmod tests {\n" + "// x\n" * 700 + "}\n"},
        [],
    ),
    ("word", {"a.txt": f"# {WORK_IN_PROGRESS}: later\n"}, ["word"]),
    ("leftover", {"codec/src/a.rs": OPEN + "fn a() { todo" + "!() }\n"}, ["word"]),
    ("machine path", {"a.txt": f"see {HOME}\n"}, ["machine-path"]),
    ("relative path", {"a.txt": "see ../wo" + "rk/x and target/ho" + "me/x\n"}, []),
    (
        "unsafe away from home",
        {"engine/src/route.rs": OPEN + "fn a() {\n    // SAFETY: so.\n    unsafe { b() }\n}\n"},
        ["unsafe-home"],
    ),
    (
        "unsafe at home",
        {"engine/src/mesh.rs": OPEN + "fn a() {\n    // SAFETY: so.\n    unsafe { b() }\n}\n"},
        [],
    ),
    ("no reason", {"engine/src/mesh.rs": OPEN + "fn a() {\n    unsafe { b() }\n}\n"}, ["safety"]),
    (
        "a reason for something else",
        {"engine/src/mesh.rs": OPEN + "// SAFETY: so.\n" + "unsafe impl A for B {}\n\n" * 2},
        ["safety"],
    ),
    ("unsafe function", {"engine/src/mesh.rs": OPEN + "pub unsafe fn a() {}\n"}, ["safety"]),
    ("unsafe in a trait", {"engine/src/mesh.rs": OPEN + "    unsafe fn a() {}\n"}, []),
    ("unsafe in a comment", {"engine/src/route.rs": OPEN + "// nothing unsafe here\n"}, []),
    ("unsafe in a string", {"engine/src/route.rs": OPEN + 'const A: &str = "unsafe {";\n'}, []),
    ("unwrap in a stage", {"engine/src/recv.rs": OPEN + UNWRAP}, ["stage"]),
    ("unwrap elsewhere", {"engine/src/stats.rs": OPEN + UNWRAP}, []),
    (
        "unwrap in a stage's tests",
        {"engine/src/recv.rs": OPEN + "#[cfg(test)]\nmod tests {\n" + UNWRAP + "}\n"},
        [],
    ),
    ("arc in a stage", {"engine/src/route.rs": OPEN + "use std::sync::Arc;\n"}, ["stage"]),
    ("atomic in a stage", {"engine/src/route.rs": OPEN + ATOMIC}, ["atomic"]),
    ("atomic at home", {"engine/src/stats.rs": OPEN + ATOMIC}, []),
    ("python opening", {"a.py": "x = 1\n"}, ["opening"]),
    ("python syntax", {"a.py": '"""A."""\nx = \n'}, ["blank", "syntax"]),
    ("dead link", {"docs/a.md": "[b](b.md)\n"}, ["link"]),
    ("live link", {"docs/a.md": "[b](../b.md#part) [c](https://example.org)\n", "b.md": "b\n"}, []),
    ("link in a fence", {"a.md": "```\n[b](b.md)\n```\n"}, []),
    ("up", {"codec/Cargo.toml": '[dependencies]\ncorelane-engine = "1"\n'}, ["arrow"]),
    ("down", {"engine/Cargo.toml": '[dependencies]\ncorelane-codec = "1"\n'}, []),
    (
        "sideways in tests",
        {"codec/Cargo.toml": '[dev-dependencies]\ncorelane-gpu-mem = "1"\n'},
        ["arrow"],
    ),
    ("serde", {"engine/Cargo.toml": '[dependencies]\nserde_json = "1"\n'}, ["arrow"]),
    (
        "tokio through another",
        {
            "engine/Cargo.toml": '[dependencies]\nhelper = "1"\n',
            "Cargo.lock": '[[package]]\nname = "helper"\ndependencies = ["tokio 1.0.0"]\n',
        },
        ["arrow"],
    ),
    ("tokio in control", {"control/Cargo.toml": '[dependencies]\ntokio = "1"\n'}, []),
]

RATCHETS = [
    ("as counted", "width a.txt 1\n", ["a.txt"], []),
    ("more than counted", "width a.txt 1\n", ["a.txt", "a.txt"], ["width", "width"]),
    ("fewer than counted", "width a.txt 2 # why\n", ["a.txt"], ["ratchet"]),
]

MASKS = [
    ("let a = '\"'; b", "let a =    ; b"),
    ("r#\"x \" y\"# z", "           z"),
    ("/* a /* b */ c */ d", "                  d"),
    ("&'a str // x", "&'a str     "),
]


def run(tidy):
    """All cases against the module `tidy`; 0 when every one holds."""
    failures = 0

    def check(kind, name, found, expected):
        nonlocal failures
        if found != expected:
            failures += 1
            print(f"self-test: {kind} '{name}': {found!r} instead of {expected!r}")

    for name, files, expected in CASES:
        check("case", name, [entry[2] for entry in tidy.Tidy(files).run()], expected)
    for name, text, paths, expected in RATCHETS:
        found = [(path, 1, "width", "x") for path in paths]
        check("ratchet", name, [entry[2] for entry in tidy.apply_ratchet(found, text)], expected)
    for source, expected in MASKS:
        check("mask", source, tidy.mask(source), expected)
    total = len(CASES) + len(RATCHETS) + len(MASKS)
    print(f"tidy self-test: {total - failures} of {total} hold")
    return 1 if failures else 0
