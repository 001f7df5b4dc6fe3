//! `migrate keep-memory`: the process that puts a copy's memory in place.

use migrate_session::destination::keep_memory;

use crate::exit::Exit;

/// Whose memory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// cgroup of the copy
    #[arg(long, default_value = "")]
    pub home: String,
    /// Processes of the copy
    pub pids: Vec<i32>,
}

pub fn run(args: &Args) -> Exit {
    if keep_memory(&args.home, &args.pids) {
        Exit::Done
    } else {
        Exit::Internal
    }
}
