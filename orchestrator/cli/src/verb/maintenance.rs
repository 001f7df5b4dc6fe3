//! `migrate maintenance`: park, run the command that reboots, resume if it fails.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use migrate_session::park::{self, ParkError, Place};
use migrate_session::{Cancel, Error};
use tokio::process::Command;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::migrate::obey_signals;
use super::park::{How, park_all, told};
use super::resume;
use crate::Output;
use crate::exit::Exit;
use crate::show::Show;

/// What to park, and what to run then.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Roots of the process trees; without any, all that are marked (see `migrate mark`)
    #[arg(value_name = "PID")]
    pub pids: Vec<i32>,
    /// The command that ends this kernel, run by `sh -c`: `systemctl kexec`, `kexec -e`, `reboot`
    #[arg(long, value_name = "COMMAND")]
    pub reboot_cmd: String,
    /// The trees come back when the command has returned and this kernel still runs after so
    /// many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub grace: u64,
    #[command(flatten)]
    pub how: How,
}

pub async fn run(mut args: Args, output: &Output) -> Exit {
    let mut show = Show::new(output);
    let cancel = Cancel::default();
    let signals = obey_signals(cancel.clone()).and_then(|()| Signals::listen());
    let mut signals = match signals {
        Ok(signals) => signals,
        Err(error) => {
            show.usage(&format!("could not listen for signals: {error}"));
            return Exit::Internal;
        }
    };
    let by_mark = args.pids.is_empty();
    if by_mark {
        if !args.how.names.is_empty() {
            show.usage("marked trees have their names; --name is for PIDs");
            return Exit::Usage;
        }
        match marked(&args.how.dir) {
            Ok(trees) => (args.pids, args.how.names) = trees.into_iter().unzip(),
            Err(error) => {
                show.error(&error);
                return Exit::of(&error);
            }
        }
    }
    let fits = |place: &Place, pid| match by_mark {
        true => park::still_marked(place, pid),
        false => Ok(()),
    };
    let places = match park_all(&args.pids, &args.how, fits, &cancel, output).await {
        Ok(places) => places,
        Err(exit) => return exit,
    };
    for place in &places {
        told(&mut show, output, place);
    }
    let why = match end_of_kernel(&args, &mut signals).await {
        End::NotYet(why) => why,
        End::GoesDown => {
            show.usage("told to end while the system goes down: the trees stay parked");
            return Exit::Done;
        }
    };
    show.usage(&format!(
        "{why}: this kernel stays, and the trees come back"
    ));
    match back(&places, output).await {
        Exit::Done => Exit::RolledBack,
        exit => exit,
    }
}

/// PIDs and names of all trees that are marked. All of them have to run: a
/// service that nobody has marked again would be lost with this kernel.
fn marked(directory: &Path) -> Result<Vec<(i32, String)>, Error> {
    let trees = park::marked(directory)?;
    if trees.is_empty() {
        return Err(ParkError::NoneMarked(directory.to_owned()).into());
    }
    let parked = |tree: park::Marked| Ok((tree.running()?, tree.place.name().to_owned()));
    trees.into_iter().map(parked).collect()
}

/// Signals from the beginning on: one that came when all trees were parked
/// already is not lost.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }
}

/// What became of the command that should end this kernel.
enum End {
    /// It has not, for this reason.
    NotYet(String),
    /// It is about to.
    GoesDown,
}

/// Runs the command. The user's Ctrl-C takes it back; a system that goes down
/// ends this process by other signals, and then nothing may come back.
async fn end_of_kernel(args: &Args, signals: &mut Signals) -> End {
    let command = &args.reboot_cmd;
    // What came while the last tree was past its commit is heard before anything is run: a
    // kernel that ends cannot be asked to stay.
    tokio::select! {
        biased;
        _ = signals.interrupt.recv() => return End::NotYet("interrupted".to_owned()),
        _ = signals.terminate.recv() => return End::GoesDown,
        () = std::future::ready(()) => {}
    }
    let child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        // Its output is not part of ours, which may be JSON.
        .stdout(std::io::stderr())
        .kill_on_drop(true)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return End::NotYet(format!("could not run `{command}`: {error}")),
    };
    let outlived = async {
        match child.wait().await {
            // `systemctl reboot` returns while the machine goes down.
            Ok(status) if status.success() => {
                tokio::time::sleep(Duration::from_secs(args.grace)).await;
                format!(
                    "`{command}` has not ended this kernel within {} s",
                    args.grace
                )
            }
            Ok(status) => format!("`{command}` failed ({status})"),
            Err(error) => format!("could not wait for `{command}`: {error}"),
        }
    };
    tokio::select! {
        why = outlived => End::NotYet(why),
        _ = signals.interrupt.recv() => End::NotYet("interrupted".to_owned()),
        _ = signals.terminate.recv() => End::GoesDown,
    }
}

async fn back(places: &[Place], output: &Output) -> Exit {
    let mut exit = Exit::Done;
    for place in places.iter().rev() {
        match resume::one(place, &resume::How::default(), output).await {
            Exit::Done => {}
            failed => exit = failed,
        }
    }
    exit
}
