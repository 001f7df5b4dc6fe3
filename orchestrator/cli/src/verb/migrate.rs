//! The default verb: move a tree.

use std::net::IpAddr;
use std::time::Duration;

use migrate_core::wire::StdioChoice;
use migrate_session::source::{self, Choices, Request};
use migrate_session::{Cancel, Reporter};
use tokio::signal::unix::{SignalKind, signal};

use super::Certificates;
use crate::Output;
use crate::exit::Exit;
use crate::show::Show;

/// What to move, and where to.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Root of the process tree
    #[arg(value_name = "PID", required = true)]
    pub pid: Option<i32>,
    /// Where to: [user@]host over SSH, or host:port of a standing agent
    #[arg(long, value_name = "[USER@]HOST|HOST:PORT", required = true)]
    pub to: Option<String>,
    #[command(flatten)]
    pub tree: TreeArgs,
    /// Roll back when the tree has stood still for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = Choices::MAX_BLACKOUT.as_secs_f64(), value_parser = seconds)]
    pub max_blackout: f64,
}

/// What can be said about the tree; also for `check`.
#[derive(Debug, Clone, clap::Args)]
pub struct TreeArgs {
    #[command(flatten)]
    pub certificates: Certificates,
    /// Where standard streams lead that lead out of the tree: keep, journal, null, or a file
    #[arg(long, value_name = "keep|journal|null|FILE", default_value = "keep", value_parser = stdio)]
    pub stdio: StdioChoice,
    /// Move this address although it looks like the host's own
    #[arg(long = "address", value_name = "IP")]
    pub addresses: Vec<IpAddr>,
    /// What if something would start a second copy when the tree ends here: refuse, or
    /// ignore it because you have seen to it
    #[arg(long, value_name = "refuse|ignore", value_enum, default_value_t = SupervisorChoice::Refuse)]
    pub supervisor: SupervisorChoice,
}

/// What to do about a supervisor that cannot be told to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SupervisorChoice {
    /// Do not move the tree.
    Refuse,
    /// The user has seen to it.
    Ignore,
}

fn stdio(text: &str) -> Result<StdioChoice, String> {
    match text {
        "keep" => Ok(StdioChoice::Keep),
        "journal" => Ok(StdioChoice::Journal),
        "null" => Ok(StdioChoice::Null),
        file if file.starts_with('/') => Ok(StdioChoice::File(file.to_owned())),
        other => Err(format!(
            "`{other}` is none of keep, journal, null, and no absolute path of a file on the destination"
        )),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is no number of seconds"))?;
    if (0.01..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not between 0.01 and 3600 seconds"))
    }
}

pub async fn run(args: Args, output: &Output) -> Exit {
    let show = Show::new(output);
    // clap has made sure of both.
    let (Some(pid), Some(to)) = (args.pid, args.to) else {
        return Exit::Usage;
    };
    let destination = match super::destination(&to, &args.tree.certificates) {
        Ok(destination) => destination,
        Err(text) => {
            show.usage(&text);
            return Exit::Usage;
        }
    };
    let request = Request {
        pid,
        destination,
        choices: Choices {
            stdio: args.tree.stdio,
            addresses: args.tree.addresses,
            max_blackout: Duration::from_secs_f64(args.max_blackout),
            ignore_supervisor: args.tree.supervisor == SupervisorChoice::Ignore,
        },
    };
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        show.usage(&format!("could not listen for signals: {error}"));
        return Exit::Internal;
    }
    let (reporter, mut events) = Reporter::channel();
    let shown = tokio::spawn(async move {
        let mut show = show;
        while let Some(event) = events.recv().await {
            show.progress(&event);
        }
        show
    });
    let outcome = source::migrate(request, reporter, cancel).await;
    // The reporter is gone, so the task ends once it has shown everything.
    let Ok(mut show) = shown.await else {
        return Exit::Internal;
    };
    match outcome {
        Ok(report) => {
            show.report(&report);
            Exit::Done
        }
        Err(failure) => {
            let exit = Exit::of_failure(&failure);
            show.failure(pid, &failure, exit as u8);
            exit
        }
    }
}

/// Ctrl-C and friends ask for a rollback.
pub fn obey_signals(cancel: Cancel) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            cancel.cancel();
        }
    });
    Ok(())
}
