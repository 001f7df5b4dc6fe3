//! Builds the eBPF programs and leaves their objects in `OUT_DIR`, one for each program
//! of `OBJECTS`.
//!
//! The target has no prebuilt standard library in rustup, so one of two
//! compilers serves, the first that is found:
//!
//! 1. one whose sysroot has `core` for the target: Debian's
//!    `rustc-web` with `libstd-rust-web-dev-bpf`;
//! 2. one whose sysroot has the library's sources (`rust-src`): `core` is then
//!    built along.
//!
//! `BPF_RUSTC` and `BPF_LINKER` name others. The programs are a workspace of
//! their own with their own lock file; all output stays in `OUT_DIR`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Binaries of `ebpf/programs`.
const OBJECTS: [&str; 2] = ["gate", "mappings"];

fn main() {
    if let Err(message) = build() {
        // One line for the person who reads cargo's output, no backtrace.
        println!("cargo::error={message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let ebpf = here.join("..");
    let programs = ebpf.join("programs");
    for input in ["src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", programs.join(input).display());
    }
    for input in ["src", "Cargo.toml"] {
        println!(
            "cargo::rerun-if-changed={}",
            ebpf.join("common").join(input).display()
        );
    }
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["BPF_RUSTC", "BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={name}");
    }

    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let compiler = find_compiler(target)?;
    let linker = find_linker()?;
    let target_dir = out.join("ebpf");

    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(&programs)
        .args([
            "build",
            "--release",
            "--locked",
            "--target",
            target,
            "--target-dir",
        ])
        .arg(&target_dir);
    // What cargo has set for the host's build must not reach this one.
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    if compiler.has_core {
        // The one crate that needs an unstable feature (inline assembly for
        // the target) may use it; nothing else changes.
        cargo.env("RUSTC_BOOTSTRAP", "aya_ebpf");
    } else {
        cargo
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["-Z", "build-std=core"]);
    }
    if let Some(path) = library_path() {
        cargo.env("LD_LIBRARY_PATH", path);
    }
    let flags = [
        format!(
            "--cfg=bpf_target_arch=\"{}\"",
            variable("CARGO_CFG_TARGET_ARCH")?
        ),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    let linker_variable = format!(
        "CARGO_TARGET_{}_LINKER",
        target.to_uppercase().replace('-', "_")
    );
    let status = cargo
        .env("RUSTC", &compiler.rustc)
        .env(linker_variable, &linker)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .status()
        .map_err(|error| format!("could not run cargo for the eBPF programs: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the eBPF programs did not build with {} and {} ({status}); the compiler's own \
             messages stand above; `scripts/setup` installs the tools that fit",
            compiler.rustc.display(),
            linker.display(),
        ));
    }
    for name in OBJECTS {
        let object = target_dir.join(target).join("release").join(name);
        std::fs::copy(&object, out.join(name).with_extension("o"))
            .map_err(|error| format!("could not copy {}: {error}", object.display()))?;
    }
    Ok(())
}

struct Compiler {
    rustc: PathBuf,
    /// Whether its sysroot has `core` built for the target.
    has_core: bool,
}

fn find_compiler(target: &str) -> Result<Compiler, String> {
    let candidates: Vec<PathBuf> = match env::var_os("BPF_RUSTC") {
        Some(named) => vec![named.into()],
        None => vec!["/usr/bin/rustc".into(), variable("RUSTC")?.into()],
    };
    let found: Vec<(PathBuf, PathBuf)> = candidates
        .iter()
        .filter_map(|rustc| Some((rustc.clone(), sysroot(rustc)?.join("lib/rustlib"))))
        .collect();
    if let Some((rustc, _)) = found.iter().find(|(_, lib)| lib.join(target).is_dir()) {
        return Ok(Compiler {
            rustc: rustc.clone(),
            has_core: true,
        });
    }
    if let Some((rustc, _)) = found
        .iter()
        .find(|(_, lib)| lib.join("src/rust/library/core").is_dir())
    {
        return Ok(Compiler {
            rustc: rustc.clone(),
            has_core: false,
        });
    }
    Err(format!(
        "no Rust compiler for {target}: run `scripts/setup`, or install Debian's \
         libstd-rust-web-dev-bpf with rustc-web, or `rustup component add rust-src`, or set \
         BPF_RUSTC"
    ))
}

fn find_linker() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("BPF_LINKER") {
        return Ok(named.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let homes = [
        env::var_os("CARGO_HOME").map(PathBuf::from),
        env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")),
    ];
    env::split_paths(&path)
        .chain(homes.into_iter().flatten().map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|linker| linker.is_file())
        .ok_or_else(|| {
            "bpf-linker is neither in PATH nor in cargo's bin directory: run `scripts/setup`, or \
             set BPF_LINKER"
                .to_owned()
        })
}

/// bpf-linker loads the first libLLVM that it finds in this path; the one of
/// the compiler that builds this crate has the version that it wants.
fn library_path() -> Option<OsString> {
    let own = sysroot(&PathBuf::from(env::var_os("RUSTC")?))?.join("lib");
    let has_llvm = std::fs::read_dir(&own)
        .ok()?
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libLLVM"));
    if !has_llvm {
        return None;
    }
    let inherited = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    env::join_paths(std::iter::once(own).chain(env::split_paths(&inherited))).ok()
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
