//! A program of the workspace that a verb builds and becomes.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

/// Whatever the program takes; its own `--help` shows it.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// What the program takes; `--help` shows it.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds packages for release and becomes one of their programs.
pub(crate) fn run(packages: &[&str], program: &str, arguments: Arguments) -> anyhow::Result<()> {
    let program = build(packages)?.join(program);
    let error = Command::new(&program).args(arguments.arguments).exec();
    Err(error).with_context(|| format!("could not run {}", program.display()))
}

/// Builds packages for release; where their programs are.
pub(crate) fn build(packages: &[&str]) -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(&cargo)
        .args(["build", "--release", "--locked", "--quiet"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .status()
        .context("could not run cargo")?;
    ensure!(built.success(), "the build failed");
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(Path::new(&target).join("release"))
}
