//! `migrate recover`: bring what a crash has left to its one right end.

use migrate_core::journal::Side;
use migrate_session::recover::{Outcome, Recovered, recover};
use migrate_session::{Reporter, State};

use crate::Output;
use crate::exit::Exit;
use crate::show::{complain, plain, say};

/// Which migrations.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this tree, or this migration as `migrate status` names it
    #[arg(value_name = "PID|MIGRATION")]
    pub name: Option<String>,
}

/// What a guard watches over.
#[derive(Debug, clap::Args)]
pub struct GuardArgs {
    /// The migration
    pub id: String,
    /// This host's side of it
    #[arg(value_enum)]
    pub side: SideName,
}

/// Names of sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SideName {
    /// Where the tree comes from.
    Source,
    /// Where it goes.
    Destination,
}

pub async fn run(args: &Args, output: &Output) -> Exit {
    let wanted = |record: &_| {
        let name = args.name.as_deref();
        name.is_none_or(|name| super::is_named(record, name))
    };
    let settled = match State::open() {
        Ok(state) => recover(&state, wanted, &Reporter::silent()).await,
        Err(error) => Err(error),
    };
    let settled = match settled {
        Ok(settled) => settled,
        Err(error) => {
            complain(&format!("migrate recover: {}", error.chain()));
            return Exit::Internal;
        }
    };
    let mut exit = Exit::Done;
    for one in &settled {
        let is_bad = one.outcome == Outcome::Undecided || !one.left.is_empty();
        if is_bad {
            exit = Exit::Undecided;
        }
        if !output.json {
            let tell = if output.quiet && is_bad {
                complain
            } else {
                say
            };
            show(one, tell);
        } else if let Ok(line) = serde_json::to_string(one) {
            println!("{line}");
        }
    }
    if settled.is_empty() && !output.json {
        say("nothing to recover");
    }
    exit
}

fn show(one: &Recovered, tell: fn(&str)) {
    let Recovered {
        migration_id,
        root_pid,
        name,
        peer,
        found,
        ..
    } = one;
    let peer = plain(peer);
    tell(&format!(
        "{migration_id}  {root_pid} ({}): {found}",
        plain(name)
    ));
    for done in &one.done {
        tell(&format!("  {done}"));
    }
    for left in &one.left {
        tell(&format!("  {left}"));
    }
    match (one.outcome, one.side) {
        (Outcome::RunsHere, _) => tell(&format!("  -> {root_pid} runs here")),
        (Outcome::RunsThere, _) => tell(&format!("  -> {root_pid} is on {peer}, not here")),
        (Outcome::UnderWay, _) => tell("  -> left alone"),
        (Outcome::Undecided, Side::Source) => tell(&format!(
            "  -> {root_pid} is kept here, fenced; run `migrate recover` on {peer}, then here again"
        )),
        (Outcome::Undecided, Side::Destination) => {
            tell(&format!(
                "  -> nothing was changed; the frozen tree is kept on {peer}"
            ));
        }
    }
}

pub async fn guard(args: GuardArgs) -> Exit {
    let side = match args.side {
        SideName::Source => Side::Source,
        SideName::Destination => Side::Destination,
    };
    match migrate_session::guard::watch(args.id, side).await {
        Ok(()) => Exit::Done,
        Err(error) => {
            tracing::error!(error = %error.chain(), "could not clear up");
            Exit::Internal
        }
    }
}
