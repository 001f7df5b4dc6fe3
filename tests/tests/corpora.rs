//! The corpora of the fuzz targets, replayed: each input as it is, cut at each
//! byte, and with each byte turned over.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::path::Path;

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Inputs of a corpus, at least: an empty directory proves nothing.
const INPUTS_MIN: usize = 4;

fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let mut inputs = 0;
    for entry in fs::read_dir(corpus.join(name)).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        let input = fs::read(&path).unwrap();
        target(&input);
        for cut in 0..input.len() {
            target(&input[..cut]);
            let mut other = input.clone();
            other[cut] ^= 0xff;
            target(&other);
        }
        inputs += 1;
    }
    assert!(inputs >= INPUTS_MIN, "{inputs} inputs for {name}");
}

#[test]
fn frames() {
    replay("frames", targets::frames);
}

#[test]
fn messages() {
    replay("messages", targets::messages);
}

#[test]
fn journals() {
    replay("journals", targets::journals);
}

#[test]
fn packets() {
    replay("packets", targets::packets);
}

#[test]
fn answers() {
    replay("answers", targets::answers);
}

#[test]
fn image_files() {
    replay("image_files", targets::image_files);
}

#[test]
fn images() {
    replay("images", targets::images);
}

#[test]
fn manifests() {
    replay("manifests", targets::manifests);
}

#[test]
fn page_streams() {
    replay("page_streams", targets::page_streams);
}
