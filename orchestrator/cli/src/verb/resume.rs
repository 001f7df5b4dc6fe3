//! `migrate resume`: parked trees come back.

use std::path::PathBuf;

use migrate_core::parked::{Away, AwayState, Mark};
use migrate_core::report::counted;
use migrate_core::wire::StdioChoice;
use migrate_session::park::{self, Place, Resume};
use migrate_session::{Cancel, Reporter};
use serde::Serialize;

use super::migrate::{AdoptName, obey_signals, stdio};
use crate::Output;
use crate::exit::Exit;
use crate::show::{Show, complain, plain, say};

/// What to resume.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the trees were parked
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Only these sets
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// List the sets and do nothing
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    pub how: How,
}

/// How trees come back.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct How {
    /// Where standard streams lead that led out of the tree, other than said at the parking
    #[arg(long, value_name = "keep|journal|null|FILE", value_parser = stdio)]
    pub stdio: Option<StdioChoice>,
    /// Which unit takes the tree where systemd runs this host: the service it was, if that is
    /// there and down, or else a scope (auto); a scope; or none
    #[arg(long, value_name = "auto|scope|none", value_enum, default_value_t = AdoptName::Auto)]
    pub adopt: AdoptName,
    /// Also a tree that may have run since it was parked, or that another machine has parked:
    /// make sure yourself that there is no second one
    #[arg(long)]
    pub force: bool,
    /// Keep the images
    #[arg(long)]
    pub keep: bool,
}

/// A tree that is back, as `--json` shows it.
#[derive(Serialize)]
struct ResumedLine<'a> {
    event: &'static str,
    set: &'a str,
    pid: i32,
    connections: usize,
    parked_s: u64,
    took_us: u64,
    rst_sent: u64,
    unit: Option<&'a str>,
}

pub async fn run(args: Args, output: &Output) -> Exit {
    let show = Show::new(output);
    let places = if args.names.is_empty() {
        Place::all(&args.dir)
    } else {
        let named = args.names.iter().map(|name| Place::new(&args.dir, name));
        named.collect::<Result<_, _>>().map_err(Into::into)
    };
    let mut places = match places {
        Ok(places) => places,
        Err(error) => {
            show.error(&error);
            return Exit::of(&error);
        }
    };
    if args.list {
        for place in &places {
            say(&sentence(place));
        }
        return Exit::Done;
    }
    if args.names.is_empty() && !args.how.force {
        // What has come back already is done with.
        places.retain(|place| !matches!(place.mark(), Ok(Some(Mark::Resumed { .. }))));
    }
    if places.is_empty() {
        say(&format!("nothing is parked in {}", args.dir.display()));
        return Exit::Done;
    }
    let mut exit = Exit::Done;
    for place in &places {
        match one(place, &args.how, output).await {
            Exit::Done => {}
            failed => exit = failed,
        }
    }
    exit
}

/// Brings one set back and says so.
pub async fn one(place: &Place, how: &How, output: &Output) -> Exit {
    let mut show = Show::new(output);
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        show.usage(&format!("could not listen for signals: {error}"));
        return Exit::Internal;
    }
    let wanted = Resume {
        place: place.clone(),
        stdio: how.stdio.clone(),
        adopt: how.adopt.into(),
        force: how.force,
        keep: how.keep,
    };
    let (reporter, mut events) = Reporter::channel();
    let shown = tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            show.progress(&event);
        }
        show
    });
    let outcome = park::resume(wanted, reporter, cancel).await;
    let Ok(show) = shown.await else {
        return Exit::Internal;
    };
    let resumed = match outcome {
        Ok(resumed) => resumed,
        Err(error) => {
            show.error(&error);
            let exit = Exit::of(&error);
            if exit == Exit::Undecided {
                complain(&format!("{} may run, or is lost", place.path().display()));
            } else {
                complain(&format!("{} was not resumed", place.path().display()));
            }
            return exit;
        }
    };
    if output.json {
        let line = ResumedLine {
            event: "resumed",
            set: &resumed.name,
            pid: resumed.root_pid,
            connections: resumed.connections,
            parked_s: resumed.parked_s,
            took_us: resumed.took_us,
            rst_sent: resumed.report.rst_sent,
            unit: resumed.unit.as_deref(),
        };
        if let Ok(line) = serde_json::to_string(&line) {
            println!("{line}");
        }
    } else {
        let unit = resumed.unit.map(|unit| format!(", in {}", plain(&unit)));
        say(&format!(
            "process {} runs again after {} s, with {}{}",
            resumed.root_pid,
            resumed.parked_s,
            counted(resumed.connections, "connection"),
            unit.unwrap_or_default()
        ));
    }
    Exit::Done
}

fn sentence(place: &Place) -> String {
    let name = place.name();
    let manifest = match place.manifest() {
        Ok(manifest) => manifest,
        Err(error) => return format!("{name}: {}", error.chain()),
    };
    let what = match place.mark() {
        Ok(None) => match place.away() {
            Ok(None) if park::is_of_here(&manifest) => "waits".to_owned(),
            Ok(None) => format!("kept for {}", plain(&manifest.host.hostname)),
            Ok(Some(Away {
                keeper,
                state: AwayState::Kept,
                ..
            })) => format!("waits on {}", plain(&keeper)),
            Ok(Some(Away {
                keeper,
                state: AwayState::Pending,
                ..
            })) => format!("may wait on {}: the parking was cut off", plain(&keeper)),
            Err(error) => error.chain(),
        },
        Ok(Some(Mark::Taken { by, .. })) => {
            format!("kept for {}, which has taken it to run it", plain(&by))
        }
        Ok(Some(Mark::Resuming { .. })) => "may run: a resume was cut off".to_owned(),
        Ok(Some(Mark::Resumed { .. })) => "was resumed".to_owned(),
        Err(error) => error.chain(),
    };
    format!(
        "{name}: process {}, {}, parked on Linux {}; {what}",
        manifest.tree.root_pid,
        counted(manifest.tree.flows.len(), "connection"),
        manifest.host.kernel
    )
}
