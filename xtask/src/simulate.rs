//! `cargo xtask simulate`: both sides of the protocol in many worlds.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use migrate_simulator::{Rules, Tally};

/// Run the protocol of both sides under faults chosen by seed.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many runs.
    #[arg(long, default_value_t = 1_000_000)]
    runs: u64,
    /// The first run's seed, the clock's if none is given; `--runs 1` replays a run.
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs, and prints how the runs ended or what one broke.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { runs, seed } = arguments;
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock stands before 1970")?
            .as_secs()
            .wrapping_mul(1 << 24),
    };
    let begun = Instant::now();
    match migrate_simulator::run_many(seed, runs, &Rules::default()) {
        Ok(Tally {
            moved,
            stayed,
            undecided,
            lost,
        }) => {
            println!(
                "{runs} runs from seed {seed} in {:.1} s: {moved} moved, {stayed} stayed, \
                 {undecided} undecided, {lost} lost after --postcopy, no rule broken",
                begun.elapsed().as_secs_f64()
            );
            Ok(())
        }
        Err(failure) => {
            for line in &failure.trace {
                println!("{line}");
            }
            let seed = failure.seed;
            bail!(
                "{failure}: {}; again: cargo xtask simulate --runs 1 --seed {seed}",
                failure.breach
            )
        }
    }
}
