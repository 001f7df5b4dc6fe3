//! `bench [SUITE...] [--quick] ...`

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context as _, ensure};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// What `migrate-bench` takes; `--help` shows it.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds everything for release and becomes the benchmark.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let packages = ["migrate-cli", "migrate-tests", "migrate-bench"];
    let built = Command::new(&cargo)
        .args(["build", "--release", "--locked", "--quiet"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .status()
        .context("could not run cargo")?;
    ensure!(built.success(), "the build failed");
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let program = std::path::Path::new(&target).join("release/migrate-bench");
    let error = Command::new(&program).args(arguments.arguments).exec();
    Err(error).with_context(|| format!("could not run {}", program.display()))
}
