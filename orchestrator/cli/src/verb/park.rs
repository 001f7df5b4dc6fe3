//! `migrate park`: trees leave for a directory; their peers wait.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use migrate_channel::StreamOptions;
use migrate_core::convergence::Policy;
use migrate_core::journal::Route;
use migrate_core::parked::{Keepalive, Manifest, RETRANSMISSION_DEFAULT_S};
use migrate_core::report::{Report, counted};
use migrate_core::stream::{Compress, STREAMS_MAX};
use migrate_core::unit::AdoptChoice;
use migrate_core::wire::{NetworkLock, RestoreChoice, StdioChoice};
use migrate_session::park::{Keeper, Place};
use migrate_session::source::{self, Choices, Request, Target};
use migrate_session::{Cancel, Error, Reporter};
use serde::Serialize;

use super::Certificates;
use super::migrate::{EngineName, SupervisorChoice, obey_signals, seconds, stdio};
use super::{report, resume};
use crate::Output;
use crate::exit::Exit;
use crate::show::{Show, plain, say};

/// What to park, and where.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Roots of the process trees
    #[arg(value_name = "PID", required = true)]
    pub pids: Vec<i32>,
    #[command(flatten)]
    pub how: How,
}

/// How trees are parked; also for `maintenance`.
#[derive(Debug, Clone, clap::Args)]
pub struct How {
    /// Where to: a directory on a disk, root's alone
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Have another host keep the memory until the tree is resumed here: [user@]host over SSH,
    /// or host:port of a standing agent. What the boot goes by still lies in --dir
    #[arg(long, value_name = "[USER@]HOST|HOST:PORT")]
    pub to: Option<String>,
    /// Connections that carry pages to that host; one a core and at most four by default
    #[arg(long, value_name = "N", requires = "to", value_parser = clap::value_parser!(u32).range(1..=i64::from(STREAMS_MAX)))]
    pub streams: Option<u32>,
    #[command(flatten)]
    pub certificates: Certificates,
    /// Names of the sets, one for each PID in their order; program and PID by default
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Where standard streams lead afterwards that lead out of the tree: keep, journal, null, or a file
    #[arg(long, value_name = "keep|journal|null|FILE", default_value = "keep", value_parser = stdio)]
    pub stdio: StdioChoice,
    /// What if something would start a second copy when the tree ends here: refuse, or
    /// ignore it because you have seen to it
    #[arg(long, value_name = "refuse|ignore", value_enum, default_value_t = SupervisorChoice::Refuse)]
    pub supervisor: SupervisorChoice,
    /// How unchanged memory is told in rounds, as for a migration
    #[arg(long, value_name = "auto|uffd|soft-dirty|full", value_enum, default_value_t = EngineName::Auto)]
    pub engine: EngineName,
    /// At most so many rounds while the tree runs
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_iterations: u32,
    /// Let the tree run on when writing it to the disk takes more than this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = seconds)]
    pub max_blackout: f64,
}

/// One parked tree as `--json` shows it.
#[derive(Serialize)]
struct ParkedLine<'a> {
    event: &'static str,
    set: &'a str,
    directory: String,
    /// The host that has the images; none where they are here.
    #[serde(skip_serializing_if = "Option::is_none")]
    keeper: Option<&'a str>,
    manifest: &'a Manifest,
}

pub async fn run(args: Args, output: &Output) -> Exit {
    let mut show = Show::new(output);
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        show.usage(&format!("could not listen for signals: {error}"));
        return Exit::Internal;
    }
    match park_all(&args.pids, &args.how, |_, _| Ok(()), &cancel, output).await {
        Ok(parked) => {
            for place in &parked {
                told(&mut show, output, place);
            }
            Exit::Done
        }
        Err(exit) => exit,
    }
}

/// Parks all trees, or none: those that are parked come back when a later one
/// cannot be. Each is looked at by `fits` right before its turn.
pub async fn park_all(
    pids: &[i32],
    how: &How,
    fits: impl Fn(&Place, i32) -> Result<(), Error>,
    cancel: &Cancel,
    output: &Output,
) -> Result<Vec<Place>, Exit> {
    let made = places(pids, how).and_then(|places| {
        let places = places.into_iter();
        places
            .map(|place| Ok((target(&place, how)?, place)))
            .collect::<Result<Vec<_>, String>>()
    });
    let places = match made {
        Ok(places) => places,
        Err(text) => {
            Show::new(output).usage(&text);
            return Err(Exit::Usage);
        }
    };
    let mut parked: Vec<Place> = Vec::new();
    for (pid, (target, place)) in pids.iter().zip(places) {
        let done = match fits(&place, *pid) {
            Ok(()) => park(*pid, target, how, cancel, output).await.map(|_| ()),
            Err(error) => {
                Show::new(output).error(&error);
                Err(Exit::of(&error))
            }
        };
        match done {
            Ok(()) => parked.push(place),
            Err(exit) => {
                for place in parked.iter().rev() {
                    if resume::one(place, &resume::How::default(), output).await != Exit::Done {
                        return Err(Exit::Undecided);
                    }
                }
                return Err(exit);
            }
        }
    }
    Ok(parked)
}

/// A set for each tree.
fn places(pids: &[i32], how: &How) -> Result<Vec<Place>, String> {
    if !how.names.is_empty() && how.names.len() != pids.len() {
        return Err(format!(
            "{} for {}\nhelp: give one --name for each PID, or none",
            counted(how.names.len(), "name"),
            counted(pids.len(), "process")
        ));
    }
    let mut seen = BTreeMap::new();
    let mut places = Vec::new();
    for (index, &pid) in pids.iter().enumerate() {
        let given = how.names.get(index).cloned();
        let name = given.unwrap_or_else(|| set_name(pid));
        if let Some(other) = seen.insert(name.clone(), pid) {
            return Err(format!("{name} would be the set of {other} and of {pid}"));
        }
        let place = Place::new(&how.dir, &name);
        places.push(place.map_err(|error| format!("{error}\nhelp: {}", error.help()))?);
    }
    Ok(places)
}

/// A set on this disk, or with another host.
fn target(place: &Place, how: &How) -> Result<(Target, Route), String> {
    let Some(to) = &how.to else {
        if how.certificates.complete()?.is_some() {
            return Err("--ca, --cert and --key are for --to HOST:PORT".to_owned());
        }
        let route = Route {
            to: place.route(),
            certificates: None,
        };
        return Ok((Target::Directory(place.clone()), route));
    };
    let stub = place.clone().for_stub();
    let route = Route {
        to: stub.route(),
        certificates: None,
    };
    let keeper = Keeper {
        stub,
        host: super::destination(to, &how.certificates)?,
        route: super::route(to, &how.certificates),
    };
    Ok((Target::Keeper(Box::new(keeper)), route))
}

/// The name of a set that was given none: program and PID.
pub fn set_name(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || c == '-' {
            c
        } else {
            '_'
        }
    };
    let comm: String = comm.trim().chars().map(plain).collect();
    if comm.is_empty() {
        format!("tree-{pid}")
    } else {
        format!("{comm}-{pid}")
    }
}

async fn park(
    pid: i32,
    (target, route): (Target, Route),
    how: &How,
    cancel: &Cancel,
    output: &Output,
) -> Result<Report, Exit> {
    let (streams, compress) = match &target {
        Target::Keeper(_) => (
            how.streams.unwrap_or_else(Choices::default_streams),
            Compress::Auto,
        ),
        Target::Directory(_) | Target::Host(_) => (1, Compress::None),
    };
    let request = Request {
        pid,
        target,
        route,
        choices: Choices {
            stdio: how.stdio.clone(),
            addresses: Vec::new(),
            max_blackout: Duration::from_secs_f64(how.max_blackout),
            engine: how.engine.into(),
            policy: Policy {
                max_iterations: how.max_iterations,
                ..Policy::default()
            },
            streams,
            stream: StreamOptions {
                compress,
                limit_bytes_per_s: None,
            },
            verify: false,
            restore: RestoreChoice::Eager,
            postcopy: false,
            // The one who brings it back says.
            adopt: AdoptChoice::None,
            ignore_supervisor: how.supervisor == SupervisorChoice::Ignore,
            lock: NetworkLock::Gate,
            in_place: true,
        },
    };
    let show = Show::new(output);
    let (reporter, mut events) = Reporter::channel();
    let shown = tokio::spawn(async move {
        let mut show = show;
        while let Some(event) = events.recv().await {
            show.progress(&event);
        }
        show
    });
    let outcome = source::migrate(request, reporter, cancel.clone()).await;
    let Ok(mut show) = shown.await else {
        return Err(Exit::Internal);
    };
    let report = match &outcome {
        Ok(report) => Some(report),
        Err(failure) => failure.report.as_deref(),
    };
    if let Some(report) = report {
        report::leave(report, &report::Keep::default(), &mut show);
    }
    outcome.map_err(|failure| {
        let exit = Exit::of_failure(&failure);
        show.failure(pid, &failure, exit as u8);
        exit
    })
}

/// What there is to know of a parked tree.
pub fn told(show: &mut Show, output: &Output, place: &Place) {
    let manifest = match place.manifest() {
        Ok(manifest) => manifest,
        Err(error) => return show.error(&error),
    };
    let away = match place.away() {
        Ok(away) => away,
        Err(error) => return show.error(&error),
    };
    if output.json {
        let line = ParkedLine {
            event: "parked",
            set: place.name(),
            directory: place.directory().display().to_string(),
            keeper: away.as_ref().map(|away| &*away.keeper),
            manifest: &manifest,
        };
        if let Ok(line) = serde_json::to_string(&line) {
            println!("{line}");
        }
        return;
    }
    for line in patience(&manifest) {
        say(&line);
    }
    let name = manifest
        .tree
        .processes
        .first()
        .map_or_else(String::new, |process| plain(&process.name));
    let parked = match &away {
        Some(away) => format!("on {}", plain(&away.keeper)),
        None => format!("in {}", place.path().display()),
    };
    say(&format!(
        "process {} ({name}) is parked {parked}; `migrate resume --dir {} --name {}` brings it back",
        manifest.tree.root_pid,
        place.directory().display(),
        place.name()
    ));
}

/// How long peers may be kept waiting, as far as it can be known: connections
/// with the same timers in one line.
fn patience(manifest: &Manifest) -> Vec<String> {
    let mut alike: BTreeMap<(Option<Keepalive>, u32), Vec<String>> = BTreeMap::new();
    for patience in &manifest.patience {
        alike
            .entry((patience.keepalive, patience.user_timeout_ms))
            .or_default()
            .push(patience.flow.remote.to_string());
    }
    let mut lines = Vec::new();
    for ((keepalive, user_timeout_ms), peers) in alike {
        let named = match &peers[..] {
            [one] => format!("peer {one}"),
            [first, ..] => format!("{} (the first is {first})", counted(peers.len(), "peer")),
            [] => continue,
        };
        let own = match keepalive {
            Some(Keepalive {
                idle_s,
                interval_s,
                probes,
            }) => format!(
                "this end probes after {idle_s} s of silence and gives up after {probes} x {interval_s} s more"
            ),
            None => "this end bears any silence".to_owned(),
        };
        let limit = match user_timeout_ms {
            0 => String::new(),
            ms => format!(", data unacknowledged for {ms} ms ends it"),
        };
        lines.push(format!("  {named}: {own}{limit}"));
    }
    if !lines.is_empty() {
        lines.push(format!(
            "  a peer's own timers are not visible from here: if they are the same, so is the \
             budget; one that has sent something gives up after some {RETRANSMISSION_DEFAULT_S} s \
             with Linux's defaults"
        ));
    }
    lines
}
