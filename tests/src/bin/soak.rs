//! Moves a redis back and forth and counts what stays behind; `cargo xtask soak`
//! builds and runs it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Parser;
use migrate_tests::soak::{HOPS_MIN, Options, run};
use nix::sys::signal::{SigSet, Signal};

/// As a shell has it for what SIGINT has ended.
const INTERRUPTED: u8 = 130;

/// Move a redis back and forth between two test hosts; its clients must notice
/// nothing, and nothing of ours may grow.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask soak", bin_name = "cargo xtask soak")]
struct Arguments {
    /// Moves
    #[arg(long, default_value_t = 200, value_parser = hops)]
    hops: usize,
    /// Connections of the strict client
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
}

fn hops(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(hops) if hops >= HOPS_MIN => Ok(hops),
        Ok(_) => Err(format!("growth shows from {HOPS_MIN} hops on")),
        Err(error) => Err(format!("not a number of hops: {error}")),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let stop = match stop_on_signal() {
        Ok(stop) => stop,
        Err(error) => {
            eprintln!("soak: could not listen for signals: {error}");
            return ExitCode::FAILURE;
        }
    };
    let options = Options {
        hops: arguments.hops,
        connections: usize::from(arguments.connections),
    };
    let outcome = run(
        options,
        |line| println!("{line}"),
        || stop.load(Ordering::Relaxed),
    );
    println!("\n{}", outcome.table);
    for fault in &outcome.faults {
        println!("FAULT {fault}");
    }
    if stop.load(Ordering::Relaxed) {
        println!("stopped after {} of {} hops", outcome.hops, arguments.hops);
        ExitCode::from(INTERRUPTED)
    } else if outcome.faults.is_empty() {
        println!("nothing was lost and nothing grows");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What is set when somebody wants the end: the hosts are taken down first.
fn stop_on_signal() -> nix::Result<Arc<AtomicBool>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    // What is started from here gets an empty mask: the standard library sees
    // to that.
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("soak: stops after this hop");
            flag.store(true, Ordering::Relaxed);
        }
    });
    Ok(stop)
}
