//! The benchmark: scenario by method on the test hosts, interleaved, strict
//! clients throughout. `cargo xtask bench` builds and runs it.
//!
//! ```text
//!   suite     which scenarios, which methods
//!   scenario  what is moved, under which load
//!   method    who moves it
//!   record    what was measured, one JSON line a run
//!   announcer who says for stock CRIU where the address is
//!   costs     what a GiB and a connection cost
//!   goals     what was aimed at, and what came of it
//!   show      tables and plots
//! ```

mod announcer;
mod costs;
mod goals;
mod method;
mod record;
mod scenario;
mod show;
mod suite;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Parser;
use method::Method;
use migrate_gate::cost;
use migrate_test_hosts::{Lab, LabGuard};
use record::{Run, Served, Store, micros, served_in_rounds, tcp};
use scenario::{Clients, Scenario};
use suite::Suite;

/// For clients to be served: a connection among many asks once a second, and stock CRIU with
/// many connections stands still for minutes.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// Connections in the gate's table when a packet's cost is taken.
const PACKET_FLOWS: [u32; 2] = [1, 100_000];

/// Moves workloads between two test hosts and compares ways to do it.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// What to measure; everything without it
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Fewer scenarios and three runs each: within ten minutes
    #[arg(long)]
    quick: bool,
    /// Runs of each method in each scenario [default: 10, with --quick 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// Only scenarios whose name has this text, for instance "10000 conn"
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only this method, for instance "migrate"; may be given several times
    #[arg(long, value_name = "NAME")]
    method: Vec<String>,
    /// Where results are kept; a run that is there is not made again
    #[arg(long, default_value = "target/bench")]
    results: PathBuf,
    /// Forget earlier results
    #[arg(long)]
    fresh: bool,
    /// Make no runs: only show those that there are
    #[arg(long, conflicts_with = "fresh")]
    show: bool,
    /// Write tables and plots into this directory as well, for instance docs
    #[arg(long)]
    docs: Option<PathBuf>,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(announcer::ANNOUNCE) {
        return match announcer::announce(arguments.next().as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    match bench(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("{failed} runs failed; the tables say which");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the runs that are missing; how many of all failed.
fn bench(arguments: &Arguments) -> anyhow::Result<usize> {
    let suites = if arguments.suites.is_empty() {
        Suite::ALL.to_vec()
    } else {
        arguments.suites.clone()
    };
    let runs = arguments
        .runs
        .unwrap_or(if arguments.quick { 3 } else { 10 });
    let (commit, machine) = (commit(), show::machine());
    let mut failed = 0;
    let (mut measured, mut costs) = (Vec::new(), Vec::new());
    for suite in suites {
        let path = arguments.results.join(format!("{}.jsonl", suite.name()));
        if arguments.fresh && path.exists() {
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        let mut store = Store::open(&path)?;
        let mut plan = suite.plan(arguments.quick);
        if let Some(text) = &arguments.only {
            plan.retain(|(scenario, _)| scenario.name().contains(text.as_str()));
        }
        if !arguments.method.is_empty() {
            for (_, methods) in &mut plan {
                methods.retain(|method| arguments.method.contains(&method.name()));
            }
            plan.retain(|(_, methods)| !methods.is_empty());
        }
        if plan.is_empty() {
            eprintln!(
                "{}: nothing is named as --only and --method say; docs/benchmarks.md has the names",
                suite.name()
            );
            continue;
        }
        let made = store.made();
        if let Some(why) = suite.leaves_out(arguments.quick) {
            eprintln!("{why}");
        }
        for (scenario, methods) in plan.iter().filter(|_| !arguments.show) {
            if let Some(why) = scenario.does_not_fit()? {
                eprintln!("{}: left out, {why}", scenario.name());
                continue;
            }
            // A B A B: what drifts on the machine meets all methods alike.
            for number in 1..=runs {
                for method in methods {
                    let key = (scenario.name(), method.name(), number);
                    if made.contains(&key) {
                        continue;
                    }
                    let mut run = measure(suite, *scenario, *method, number);
                    run.commit.clone_from(&commit);
                    run.machine = Some(machine.clone());
                    eprintln!("{}", show::line(&run));
                    store.add(run)?;
                }
            }
        }
        // What others lose, and ours where it is told to, is a result.
        let ours: Vec<String> = plan
            .iter()
            .flat_map(|(_, methods)| methods)
            .filter(|method| !method.may_fail())
            .map(|method| method.name())
            .collect();
        failed += store
            .runs
            .iter()
            .filter(|run| run.failure.is_some() && ours.contains(&run.method))
            .count();
        let table = show::table(suite, &plan, &store.runs);
        println!("{table}");
        if suite == Suite::Gate {
            for flows in PACKET_FLOWS {
                costs.extend(cost::open_gate(flows)?);
            }
            println!("{}", show::packet_costs(&costs));
        }
        measured.push((suite, plan, store.runs));
    }
    println!("{}", goals::table(&measured, &costs));
    if let Some(docs) = &arguments.docs {
        show::write_docs(docs, &measured, &costs)?;
    }
    Ok(failed)
}

/// The commit that is checked out, with a plus where something was changed since.
fn commit() -> Option<String> {
    let described = Command::new("git")
        .args(["describe", "--always", "--exclude=*", "--dirty=+"])
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let name = String::from_utf8(described.stdout).ok()?;
    Some(name.trim().to_owned())
}

/// One migration on hosts of its own.
fn measure(suite: Suite, scenario: Scenario, method: Method, number: u32) -> Run {
    let mut run = Run::of(suite.name(), scenario.name(), method.name(), number);
    if let Err(error) = migrate(scenario, method, &mut run) {
        run.failure = Some(format!("{error:#}"));
    }
    run
}

fn migrate(scenario: Scenario, method: Method, run: &mut Run) -> anyhow::Result<()> {
    let lab: LabGuard = Lab::scoped(&format!("bench-{}", std::process::id()))?;
    let pid = scenario.start(&lab)?;
    let mut clients = scenario.clients(&lab, method.reply_limit())?;
    clients.are_served(SETTLE_LIMIT)?;
    let prepared = method.prepare(&lab, scenario.address())?;
    let (client_before, hosts_before) = tcp(&lab)?;
    clients.begin();
    let perform = || method.perform(&lab, pid, prepared);
    let (moved, seen) = if scenario.is_pressed() {
        watched(&mut clients, perform)?
    } else {
        (perform(), Vec::new())
    };
    if let Ok((took, report)) = &moved {
        run.took_us = micros(*took);
        run.report.clone_from(report);
        // A line for each of ten connections is more than all the rest together.
        if let Some(seen) = run
            .report
            .as_mut()
            .and_then(|kept| kept.continuity.as_mut())
        {
            seen.worst.clear();
        }
        run.served_in_rounds_percent = report
            .as_ref()
            .and_then(|report| served_in_rounds(&seen, report));
    }
    // One that has lost a request waits for its limit and ends.
    let served = clients.are_served(method.reply_limit() * 3 / 2);
    let (client_after, hosts_after) = tcp(&lab)?;
    run.client_tcp = client_after.since(client_before);
    run.hosts_tcp = hosts_after.since(hosts_before);
    let heard = clients.stop()?;
    run.heard(&heard);
    moved?;
    anyhow::ensure!(
        heard.errors == 0,
        "{} errors at the client: {}",
        heard.errors,
        heard.first_errors.join("; ")
    );
    served?;
    Ok(())
}

/// How long clients are watched before the move, to know what they get then.
const WATCHED_BEFORE: Duration = Duration::from_secs(1);

/// How often clients are asked how many replies they had.
const WATCHED_EVERY: Duration = Duration::from_millis(5);

/// Does something while it counts what clients get, which begins before.
fn watched<T>(clients: &mut Clients, work: impl FnOnce() -> T) -> anyhow::Result<(T, Vec<Served>)> {
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        let watching = scope.spawn(move || {
            let mut seen = Vec::new();
            loop {
                let requests = clients.replies()?;
                let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
                seen.push(Served {
                    at_us: micros(at),
                    requests,
                });
                // Its end stands for the word as well.
                if is_done.recv_timeout(WATCHED_EVERY) != Err(RecvTimeoutError::Timeout) {
                    return anyhow::Ok(seen);
                }
            }
        });
        thread::sleep(WATCHED_BEFORE);
        let worked = work();
        drop(done);
        let seen = watching
            .join()
            .map_err(|_| anyhow::anyhow!("the watch panicked"))??;
        Ok((worked, seen))
    })
}
