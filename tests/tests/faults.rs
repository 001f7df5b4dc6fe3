//! Every fault at every moment of a migration, under live load: one host runs
//! the tree afterwards, with the connections it had, and the next migration
//! succeeds.
//!
//! Each side can be held at a named moment (`MIGRATE_STOP_AT`, in builds with
//! debug assertions), so that a fault falls where the table says. A run takes
//! some of the cells, chosen by `MIGRATE_FAULTS_SEED`; `MIGRATE_FAULTS=all`
//! takes all of them, `MIGRATE_FAULTS=TEXT` those whose name contains it.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use migrate_test_hosts::{Host, HostName};
use migrate_tests::hosts::{eventually, has_address, runs};
use migrate_tests::migration::print_logs;
use migrate_tests::refusals::{
    Ended, Held, Running, Scene, Starved, UNDECIDED, agent, criu_if_any, driver, guards, is_over,
    is_stopped, keepers, leftovers, shell, unwall, wall,
};
use migrate_tests::require;
use migrate_tests::workload::Kind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// `migrate` is killed; its guard clears up.
    Orchestrator,
    /// With its guard: `migrate recover` clears up.
    OrchestratorAndGuard,
    Agent,
    AgentAndGuard,
    CriuSource,
    CriuDestination,
    /// The process that puts memory in place while the copy runs.
    LazyServer,
    NetworkCut,
    /// The agent stands still and keeps its connections.
    NetworkStall,
    DestinationFull,
    SourceFull,
    /// The kernel has no memory left for `migrate` and what it has started there.
    SourceStarved,
    GateRemoved,
    AddressTaken,
    Cancel,
    ClockStep,
}

const FAULTS: [Fault; 16] = [
    Fault::Orchestrator,
    Fault::OrchestratorAndGuard,
    Fault::Agent,
    Fault::AgentAndGuard,
    Fault::CriuSource,
    Fault::CriuDestination,
    Fault::LazyServer,
    Fault::NetworkCut,
    Fault::NetworkStall,
    Fault::DestinationFull,
    Fault::SourceFull,
    Fault::SourceStarved,
    Fault::GateRemoved,
    Fault::AddressTaken,
    Fault::Cancel,
    Fault::ClockStep,
];

/// Moments of the source: its phases, and two within the handover.
const AT_SOURCE: [&str; 12] = [
    "preflight",
    "track",
    "prepare",
    "precopy",
    "freeze",
    "dump",
    "restore",
    "handover",
    "fenced",
    "sealed",
    "takeover",
    "finish",
];

/// Moments of the destination.
const AT_DESTINATION: [&str; 6] = [
    "prepared", "received", "restored", "owned", "let-go", "running",
];

/// Moments at which the copy runs, or may.
const COPY_RUNS: [&str; 3] = ["takeover", "finish", "running"];

/// Cells of a run that is not told which to take.
const CELLS: usize = 40;

/// Where images go in the tests of full file systems.
const IMAGES: &str = "/srv/img";

/// To hold a side at a moment, to end, to settle.
const WITHIN: Duration = Duration::from_secs(60);

type Cell = (Fault, &'static str);

fn cells() -> Vec<Cell> {
    let mut all: Vec<Cell> = FAULTS
        .iter()
        .flat_map(|fault| AT_SOURCE.map(|moment| (*fault, moment)))
        .collect();
    for fault in [
        Fault::Agent,
        Fault::AgentAndGuard,
        Fault::CriuDestination,
        Fault::LazyServer,
    ] {
        all.extend(AT_DESTINATION.map(|moment| (fault, moment)));
    }
    match std::env::var("MIGRATE_FAULTS").as_deref() {
        Ok("all") => return all,
        Ok(text) => {
            all.retain(|(fault, moment)| format!("{fault:?} {moment}").contains(text));
            return all;
        }
        Err(_) => {}
    }
    let seed = std::env::var("MIGRATE_FAULTS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    println!("seed {seed}");
    shuffle(&mut all, seed);
    // While the tree runs, a peer that says nothing is given a minute and a half.
    let is_slow = |fault, moment| {
        matches!(fault, Fault::NetworkCut | Fault::NetworkStall) && AT_SOURCE[..4].contains(&moment)
    };
    all.retain(|(fault, moment)| *fault != Fault::ClockStep && !is_slow(*fault, moment));
    all.truncate(CELLS);
    all
}

/// Fisher and Yates with splitmix64.
fn shuffle<T>(items: &mut [T], mut seed: u64) {
    for last in (1..items.len()).rev() {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = seed;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bound = u64::try_from(last + 1).unwrap();
        items.swap(last, usize::try_from((x ^ (x >> 31)) % bound).unwrap());
    }
}

#[test]
fn every_fault_ends_with_one_running_tree() {
    require!("every_fault_ends_with_one_running_tree": root, tcx, criu, migrate, redis, nft);
    let mut scene = Scene::start("faults", Kind::Redis, 5);
    let fill = "redis-benchmark -h 10.77.0.100 -t set -r 30000 -n 30000 -d 700 -P 100 -c 10 -q";
    shell(&scene.lab.host(HostName::Client), fill);
    for host in [scene.source(), scene.destination()] {
        let mount = format!("mkdir -p {IMAGES} && mount -t tmpfs -o size=160m tmpfs {IMAGES}");
        shell(&host, &mount);
    }
    let mut table = BTreeMap::new();
    for (fault, moment) in cells() {
        let begun = Instant::now();
        println!("== {fault:?} at {moment}");
        let outcome = run(&mut scene, fault, moment);
        println!(
            "== {fault:?} at {moment}: {outcome} ({:?})",
            begun.elapsed()
        );
        table.insert((fault, moment), outcome);
    }
    println!("{}", show(&table));
    scene.moves_now();
}

/// One cell, from a running tree to the next successful migration.
fn run(scene: &mut Scene, fault: Fault, moment: &'static str) -> String {
    match fault {
        // A copy that runs may be killed with it, and nobody has it then.
        Fault::LazyServer if COPY_RUNS.contains(&moment) => {
            return "no: memory_arrives_without_the_keeper shows it".to_owned();
        }
        Fault::ClockStep => {
            return "no: the clock is the machine's; vm_kernels steps one".to_owned();
        }
        _ => {}
    }
    let (source, destination) = (scene.source(), scene.destination());
    let at_destination = AT_DESTINATION.contains(&moment);
    let mut command = match fault {
        Fault::LazyServer => scene.to_destination(&["--json", "--restore", "lazy"]),
        _ => scene.to_destination(&["--json"]),
    };
    let mut remote = "env".to_owned();
    if at_destination {
        let _ = write!(remote, " MIGRATE_STOP_AT={moment}");
    } else {
        command.env("MIGRATE_STOP_AT", moment);
    }
    match fault {
        Fault::DestinationFull => {
            let _ = write!(remote, " MIGRATE_IMAGE_DIR={IMAGES}");
        }
        Fault::SourceFull => {
            command.env("MIGRATE_IMAGE_DIR", IMAGES);
        }
        _ => {}
    }
    command.env("MIGRATE_REMOTE_COMMAND", format!("{remote} migrate"));
    let running = Running::start(command);
    let driver = driver(&source);
    let agent = agent(&destination);
    let held = if at_destination { agent } else { driver };
    assert!(eventually(WITHIN, || is_stopped(held)), "{moment} comes");
    let was_there = address_length(&source);

    let provoked = provoke(scene, fault, driver, agent);
    let _ = kill(held, Signal::SIGCONT);
    let ended = finish(running, provoked.as_ref().ok());
    let provoked = match provoked {
        Ok(Provoked::Starved(starved)) if ended.status.success() && !starved.has_killed() => {
            Err("nothing there took more memory")
        }
        other => other,
    };
    let what = match provoked {
        Ok(provoked) => {
            provoked.undo();
            None
        }
        Err(why) => {
            assert_eq!(ended.status.code(), Some(0), "nothing was done: {ended:#?}");
            Some(why)
        }
    };
    if fault == Fault::AddressTaken
        && let Some(length) = was_there
        && runs(&source, scene.workload.pid)
        && !has_address(&source, scene.workload.kind.address().ip()).unwrap()
    {
        let address = scene.workload.kind.address().ip();
        shell(
            &source,
            &format!("ip address add {address}/{length} dev eth0"),
        );
    }
    let outcome = settle(scene, &ended, fault);
    if fault == Fault::NetworkCut {
        // It hears of the source's end by its own silence limit.
        eventually(WITHIN * 2, || leftovers(&destination).is_empty());
    }
    scene.unharmed();
    scene.moves();
    what.map_or(outcome, |why| format!("no: {why}"))
}

/// Brings what is left to its end, and says what became of it.
fn settle(scene: &mut Scene, ended: &Ended, fault: Fault) -> String {
    let (source, destination) = (scene.source(), scene.destination());
    let code = ended.status.code();
    let mut how = code.map_or_else(|| "killed".to_owned(), |code| format!("exit {code}"));
    let alone = match fault {
        Fault::OrchestratorAndGuard | Fault::AgentAndGuard => true,
        // The guard may have needed memory, too.
        Fault::SourceStarved => code.is_none(),
        _ => false,
    };
    if code == Some(UNDECIDED) || alone {
        // Twice at once, on both hosts: each record is settled once.
        for host in [&destination, &source] {
            let both = [(); 2].map(|()| {
                let mut command = host.command("migrate");
                command.args(["recover", "--json"]);
                Running::start(command)
            });
            for one in both {
                let one = one.finish();
                assert_eq!(one.status.code(), Some(0), "{one:#?} after {ended:#?}");
            }
        }
        how += ", recover";
    }
    let pid = scene.workload.pid;
    let mut places = (false, false);
    let settled = eventually(WITHIN, || {
        places = (runs(&source, pid), runs(&destination, pid));
        let undecided = shell(&source, "ls /run/migrate/journal").contains(".source.json");
        places.0 != places.1 && !undecided
    });
    if !settled {
        print_logs(&source);
        print_logs(&destination);
    }
    assert!(settled, "one of {places:?} after {ended:#?}");
    if places.1 {
        scene.has_moved();
        how + ": moved"
    } else {
        assert_ne!(code, Some(0), "{ended:#?}");
        how + ": back"
    }
}

/// The end of the command. A fault that would last longer than the client's
/// patience is taken away when the command has noticed it.
fn finish(mut running: Running, provoked: Option<&Provoked>) -> Ended {
    if let Some(Provoked::Wall(host)) = provoked {
        running.await_event(|event| {
            event["event"] == "failed"
                || event["event"] == "failure"
                || event["event"] == "report"
                || event["event"] == "warning"
        });
        unwall(host);
    }
    running.finish()
}

/// What was done, and how to take it away.
enum Provoked {
    Nothing,
    Wall(Host),
    Still(Held),
    Filler(Host),
    Starved(Starved),
}

impl Provoked {
    fn undo(self) {
        match self {
            Self::Nothing => {}
            Self::Wall(host) => unwall(&host),
            Self::Still(held) => drop(held),
            Self::Starved(starved) => drop(starved),
            Self::Filler(host) => {
                shell(&host, &format!("rm -f {IMAGES}/filler"));
            }
        }
    }
}

/// Makes a fault happen, or says why it cannot here.
fn provoke(scene: &Scene, fault: Fault, driver: Pid, agent: Pid) -> Result<Provoked, &'static str> {
    let (source, destination) = (scene.source(), scene.destination());
    let end = |pid: Pid| kill(pid, Signal::SIGKILL).unwrap();
    match fault {
        Fault::Orchestrator => end(driver),
        Fault::OrchestratorAndGuard => {
            guards(&source).into_iter().for_each(end);
            end(driver);
        }
        Fault::Agent => end(agent),
        Fault::AgentAndGuard => {
            guards(&destination).into_iter().for_each(end);
            end(agent);
        }
        Fault::CriuSource => end(*criu_if_any(driver).first().ok_or("no CRIU there")?),
        Fault::CriuDestination => end(*criu_if_any(agent).first().ok_or("no CRIU there")?),
        Fault::NetworkCut => {
            wall(&destination, &source);
            return Ok(Provoked::Wall(destination));
        }
        Fault::NetworkStall => return Ok(Provoked::Still(Held::stop(agent))),
        Fault::DestinationFull => return Ok(fill(destination)),
        Fault::SourceFull => return Ok(fill(source)),
        Fault::SourceStarved => {
            let starved = Starved::with_helpers(driver).ok_or("no memory cgroups here")?;
            return Ok(Provoked::Starved(starved));
        }
        Fault::GateRemoved => {
            let said = shell(&source, "migrate unlock --force");
            if said.contains("no gate is left") {
                return Err("no gate there");
            }
        }
        Fault::AddressTaken => {
            let address = scene.workload.kind.address().ip();
            let length = address_length(&source).ok_or("the address is not there")?;
            shell(
                &source,
                &format!("ip address del {address}/{length} dev eth0"),
            );
        }
        Fault::Cancel => {
            let mut cancel = scene.migrate(&["cancel", &scene.workload.pid.to_string()]);
            let cancel = std::thread::spawn(move || cancel.output());
            let asked = eventually(WITHIN, || is_asked_to_end(driver) || cancel.is_finished());
            assert!(asked);
            if cancel.is_finished() {
                let output = cancel.join().unwrap().unwrap();
                assert_eq!(output.status.code(), Some(3), "{output:?}");
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(said.contains("cannot be taken back"), "{said}");
                return Err("refused, past the commit");
            }
        }
        Fault::LazyServer => {
            let keeper = *keepers(&destination).first().ok_or("no keeper there")?;
            end(keeper);
            // What is let go on may be at its next step before the kernel is.
            assert!(
                eventually(WITHIN, || is_over(keeper)),
                "{keeper} does not end"
            );
        }
        Fault::ClockStep => return Err("not here"),
    }
    Ok(Provoked::Nothing)
}

fn fill(host: Host) -> Provoked {
    let full =
        format!("dd if=/dev/zero of={IMAGES}/filler bs=64k 2>/dev/null; test -s {IMAGES}/filler");
    shell(&host, &full);
    Provoked::Filler(host)
}

/// Whether a process that stands still has a SIGTERM waiting.
fn is_asked_to_end(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status
        .lines()
        .find_map(|line| line.strip_prefix("ShdPnd:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    pending.is_some_and(|mask| mask & (1 << (Signal::SIGTERM as u64 - 1)) != 0)
}

fn address_length(host: &Host) -> Option<String> {
    let shown = shell(host, "ip -o -4 address show dev eth0 to 10.77.0.100");
    let address = shown.split_whitespace().nth(3)?;
    Some(address.split_once('/')?.1.to_owned())
}

fn show(table: &BTreeMap<Cell, String>) -> String {
    let mut text = String::new();
    for fault in FAULTS {
        for ((_, moment), outcome) in table.iter().filter(|((of, _), _)| *of == fault) {
            let _ = writeln!(text, "| {fault:?} | {moment} | {outcome} |");
        }
    }
    text
}
