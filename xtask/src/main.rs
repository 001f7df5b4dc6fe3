//! The chores of this repository, one file per verb.

mod dist;
mod hosts;
mod program;
mod simulate;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Test hosts: two machines and a client, made of namespaces on this one.
    #[command(subcommand)]
    Hosts(hosts::Verb),
    /// Move workloads between test hosts and compare ways to do it.
    Bench(program::Arguments),
    /// Move a redis back and forth and count what stays behind.
    Soak(program::Arguments),
    /// What is installed, and a Debian package of it.
    Dist(dist::Arguments),
    /// Run the protocol of both sides under faults chosen by seed.
    Simulate(simulate::Arguments),
    /// Virtual machines with Debian's kernels, in the place of the test hosts.
    #[command(subcommand)]
    Vm(vm::Verb),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Hosts(verb) => hosts::run(verb),
        Verb::Bench(arguments) => program::run(&vm::BENCH_PACKAGES, "migrate-bench", arguments),
        Verb::Soak(arguments) => program::run(&["migrate-cli", "migrate-tests"], "soak", arguments),
        Verb::Dist(arguments) => dist::run(arguments),
        Verb::Simulate(arguments) => simulate::run(arguments),
        Verb::Vm(verb) => vm::run(verb),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let help = error
                .downcast_ref::<migrate_test_hosts::Error>()
                .and_then(|e| e.help())
                .or_else(|| error.downcast_ref::<migrate_test_vms::Error>()?.help());
            if let Some(help) = help {
                eprintln!("help: {help}");
            }
            ExitCode::FAILURE
        }
    }
}
