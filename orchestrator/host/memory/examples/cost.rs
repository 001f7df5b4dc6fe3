//! What pre-copy costs on this machine: `cost [MIB]`.
//!
//! A process fills so much memory, 1024 MiB unless told, and then waits; its
//! memory is copied to nowhere, to a page store, and looked at again unchanged.
//! Injection is tried a hundred times.

use std::convert::Infallible;
use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use bytes::Bytes;
use migrate_core::wire::PageRun;
use migrate_memory::{Limits, PageSink, PageStore, Precopy, RoundStats, StoreError, TrackingState};

struct Nowhere;

impl PageSink for Nowhere {
    type Error = Infallible;

    async fn pages(&mut self, _: PageRun, _: Bytes) -> Result<(), Infallible> {
        Ok(())
    }
}

struct Store(PageStore);

impl PageSink for Store {
    type Error = StoreError;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), StoreError> {
        self.0.put(run, &data)
    }
}

fn print(what: &str, stats: &RoundStats) {
    println!(
        "{what}: {} ms, of which sink {} ms; {} pages written, {} skipped, {} MiB",
        stats.took_us as f64 / 1000.0,
        stats.sink_us as f64 / 1000.0,
        stats.pages_written,
        stats.pages_skipped,
        stats.bytes >> 20
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mib = std::env::args().nth(1).unwrap_or_else(|| "1024".into());
    let victim = std::env::current_exe()?.with_file_name("victim");
    let mut child = Command::new(victim)
        .args(["idle", &mib])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let output = child.stdout.take().ok_or("no output")?;
    BufReader::new(output).read_line(&mut line)?;
    let pid = child.id().cast_signed();

    let mut precopy = Precopy::new(pid, Limits::default())?;
    print(
        "first round, to nowhere",
        &precopy.round(&mut Nowhere).await?,
    );
    for _ in 0..3 {
        print("unchanged", &precopy.round(&mut Nowhere).await?);
    }
    // Two trackers cannot watch the same memory.
    drop(precopy);
    let mut precopy = Precopy::new(pid, Limits::default())?;
    let mut store = Store(PageStore::new(u64::MAX));
    print(
        "first round, to a new store",
        &precopy.round(&mut store).await?,
    );
    drop(precopy);
    let mut precopy = Precopy::new(pid, Limits::default())?;
    print(
        "again, to the same store",
        &precopy.round(&mut store).await?,
    );
    for owner in store.0.owners().collect::<Vec<_>>() {
        let began = Instant::now();
        let _digest = store.0.digest(owner, &[]);
        println!("digest: {:?}", began.elapsed());
    }

    drop(precopy);
    let mut stopped = Vec::new();
    let mut took = Vec::new();
    for _ in 0..100 {
        let mut precopy = Precopy::new(pid, Limits::default())?;
        // The first page handed on ends the round.
        struct Enough;
        impl PageSink for Enough {
            type Error = std::io::Error;
            async fn pages(&mut self, _: PageRun, _: Bytes) -> Result<(), std::io::Error> {
                Err(std::io::Error::other("enough"))
            }
        }
        let _ = precopy.round(&mut Enough).await;
        for process in precopy.processes() {
            if let TrackingState::Tracked { injection } = process.state {
                stopped.push(injection.stopped_us);
                took.push(injection.took_us);
            }
        }
    }
    stopped.sort_unstable();
    took.sort_unstable();
    println!(
        "injection: a thread stopped for {} us (median), {} us (most of 100); {} us in all (median)",
        stopped[stopped.len() / 2],
        stopped[stopped.len() - 1],
        took[took.len() / 2]
    );
    child.kill()?;
    child.wait()?;
    Ok(())
}
