//! Runs every hook over its committed corpus, so that findings stay fixed without a fuzzer.

use std::fs;
use std::path::Path;

use corelane_codec::fuzz;

const FILE_BYTES_MAX: u64 = 4096;
const ALL_BYTES_MAX: u64 = 500 << 10;

#[test]
fn corpora_hold() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut all_bytes = 0;
    for (name, hook) in fuzz::ALL {
        let mut seeds = 0;
        for entry in fs::read_dir(corpus.join(name)).expect(name) {
            let path = entry.expect(name).path();
            let bytes = fs::read(&path).expect(name);
            assert!(bytes.len() as u64 <= FILE_BYTES_MAX, "{}", path.display());
            all_bytes += bytes.len() as u64;
            seeds += 1;
            hook(&bytes);
        }
        assert!(seeds > 0, "{name} has no seed");
    }
    assert!(all_bytes <= ALL_BYTES_MAX, "{all_bytes} bytes of seeds");
}

#[test]
fn every_hook_is_a_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).expect("the manifest");
    for (name, _) in fuzz::ALL {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let target = fs::read_to_string(fuzz.join(format!("targets/{name}.rs"))).expect(name);
        assert!(target.contains(&format!("fuzz::{name}(data)")), "{name}");
    }
}
