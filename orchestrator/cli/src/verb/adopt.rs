//! `migrate adopt`: the process of a unit that takes a moved tree in.

use crate::exit::Exit;

/// Which tree.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// When its root began, in clock ticks since the boot
    #[arg(long)]
    pub ticks: u64,
    /// cgroup that it was restored in
    #[arg(long, default_value = "")]
    pub home: String,
    /// Its root
    pub pid: i32,
}

pub fn run(args: &Args) -> Exit {
    match migrate_session::adopt(args.pid, args.ticks, &args.home) {
        Ok(()) => Exit::Done,
        Err(error) => {
            // The unit's journal has it.
            eprintln!(
                "migrate: could not take process {} in: {}",
                args.pid,
                error.chain()
            );
            Exit::Internal
        }
    }
}
