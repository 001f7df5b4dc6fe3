//! Builds the library that is preloaded into CRIU, `OUT_DIR/migrate_shim.so`,
//! of the sources of migrate-shim.
//!
//! They need nothing but `core`, so that one call of the compiler does it:
//! cargo cannot make a shared object as a dependency of a library.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    if let Err(message) = build() {
        // One line for the person who reads cargo's output, no backtrace.
        println!("cargo::error={message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let shim = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("../../shim/src");
    println!("cargo::rerun-if-changed={}", shim.display());
    println!("cargo::rerun-if-changed=build.rs");

    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .args([
            "--edition=2024",
            "--crate-name=migrate_shim",
            "--crate-type=cdylib",
        ])
        .args(["--cfg=preload", "--cap-lints=warn"])
        .arg(format!("--target={}", variable("TARGET")?))
        .args([
            "-Copt-level=2",
            "-Cpanic=abort",
            "-Clto=yes",
            "-Cstrip=symbols",
        ])
        // Nothing of the C library's start-up code, which would tie it to one.
        .arg("-Clink-arg=-nostartfiles")
        .arg("-o")
        .arg(PathBuf::from(variable("OUT_DIR")?).join("migrate_shim.so"))
        .arg(shim.join("lib.rs"));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let status = rustc
        .status()
        .map_err(|error| format!("could not run the compiler for the shim: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the shim did not build ({status}); the compiler's own messages stand above"
        ));
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
