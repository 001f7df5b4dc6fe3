//! `migrate mark` and `migrate unmark`: which trees a maintenance parks.

use std::path::PathBuf;

use migrate_session::Error;
use migrate_session::park::{self, Place};

use super::park::set_name;
use crate::exit::Exit;
use crate::show::{complain, say};

/// What to mark.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Root of the process tree; without one, the marked trees are listed
    #[arg(value_name = "PID")]
    pub pid: Option<i32>,
    /// Where it is to be parked: a directory on a disk, root's alone
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of its set; program and PID by default
    #[arg(long, value_name = "NAME", requires = "pid")]
    pub name: Option<String>,
}

/// Which mark to take away.
#[derive(Debug, clap::Args)]
pub struct UnmarkArgs {
    /// The tree's name, as `migrate mark --dir DIR` lists it
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Where it was to be parked
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

pub fn run(args: &Args) -> Exit {
    let done = match args.pid {
        Some(pid) => mark(args, pid),
        None => list(args),
    };
    done.map_or_else(|error| failed("mark", &error), |()| Exit::Done)
}

pub fn unmark(args: &UnmarkArgs) -> Exit {
    let mut exit = Exit::Done;
    for name in &args.names {
        let place = Place::new(&args.dir, name).map_err(Error::from);
        match place.and_then(|place| park::unmark(&place)) {
            Ok(()) => say(&format!("{name} is no longer marked")),
            Err(error) => exit = failed("unmark", &error),
        }
    }
    exit
}

fn mark(args: &Args, pid: i32) -> Result<(), Error> {
    let name = args.name.clone().unwrap_or_else(|| set_name(pid));
    let place = Place::new(&args.dir, &name)?;
    park::mark(&place, pid)?;
    say(&format!(
        "process {pid} is marked as {name}: `migrate maintenance --dir {}` parks it",
        place.directory().display()
    ));
    Ok(())
}

fn list(args: &Args) -> Result<(), Error> {
    let marked = park::marked(&args.dir)?;
    if marked.is_empty() {
        say(&format!("nothing is marked in {}", args.dir.display()));
    }
    for tree in marked {
        let state = if tree.runs { "runs" } else { "does not run" };
        say(&format!(
            "{}: process {}, {state}",
            tree.place.name(),
            tree.pid
        ));
    }
    Ok(())
}

fn failed(verb: &str, error: &Error) -> Exit {
    complain(&format!("migrate {verb}: {}", error.chain()));
    if let Some(help) = error.help() {
        complain(&format!("help: {help}"));
    }
    Exit::of(error)
}
