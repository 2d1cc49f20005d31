//! How tests replay the corpus of a fuzz target. The tests of all packages include this file.

use std::path::Path;

/// Runs a target on its seeds and on every kept input of its corpus. With `WRITE_SEEDS` in the environment the seeds
/// are written to the corpus first, for a fuzzer to begin with.
pub(crate) fn replay(name: &str, target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    if std::env::var_os("WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&corpus).unwrap();
        for (at, seed) in seeds.iter().enumerate() {
            std::fs::write(corpus.join(format!("seed-{at}")), seed).unwrap();
        }
    }
    seeds.iter().for_each(|seed| target(seed));
    let kept: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!kept.is_empty(), "{} is empty", corpus.display());
    for path in kept {
        // Shown when the input makes the target fail.
        eprintln!("{}", path.display());
        target(&std::fs::read(&path).unwrap());
    }
}

/// Bytes behind the byte that says what a target does with them.
pub(crate) fn after(first: u8, bytes: &[u8]) -> Vec<u8> {
    [&[first], bytes].concat()
}
