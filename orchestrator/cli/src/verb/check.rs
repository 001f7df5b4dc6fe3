//! `migrate check`: preflight as a table, nothing moved.

use migrate_channel::StreamOptions;
use migrate_core::convergence::Policy;
use migrate_core::preflight::refused;
use migrate_core::wire::RestoreChoice;
use migrate_session::Reporter;
use migrate_session::source::{self, Checked, Choices};

use super::migrate::{SupervisorChoice, TreeArgs};
use crate::Output;
use crate::exit::Exit;
use crate::show::Show;

/// What to examine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Root of the process tree
    #[arg(value_name = "PID")]
    pub pid: i32,
    /// Let this host compare as well: [user@]host or host:port
    #[arg(long, value_name = "[USER@]HOST|HOST:PORT")]
    pub to: Option<String>,
    #[command(flatten)]
    pub tree: TreeArgs,
}

pub async fn run(args: Args, output: &Output) -> Exit {
    let mut show = Show::new(output);
    let destination = match args
        .to
        .as_deref()
        .map(|to| super::destination(to, &args.tree.certificates))
        .transpose()
    {
        Ok(destination) => destination,
        Err(text) => {
            show.usage(&text);
            return Exit::Usage;
        }
    };
    let choices = Choices {
        stdio: args.tree.stdio,
        addresses: args.tree.addresses,
        max_blackout: Choices::MAX_BLACKOUT,
        engine: args.tree.engine.into(),
        policy: Policy::default(),
        streams: 1,
        stream: StreamOptions::default(),
        verify: false,
        restore: RestoreChoice::default(),
        postcopy: false,
        lock: args.tree.network_lock.into(),
        adopt: args.tree.adopt.into(),
        ignore_supervisor: args.tree.supervisor == SupervisorChoice::Ignore,
        in_place: false,
    };
    match source::check(
        args.pid,
        destination.as_ref(),
        &choices,
        &Reporter::silent(),
    )
    .await
    {
        Ok(Checked { findings, sockets }) => {
            show.sockets(&sockets);
            show.table(&findings);
            if refused(&findings) {
                Exit::Refused
            } else {
                Exit::Done
            }
        }
        Err(error) => {
            show.error(&error);
            Exit::of(&error)
        }
    }
}
