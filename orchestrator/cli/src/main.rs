//! `migrate`: moves a running process tree to another Linux host while its
//! TCP peers stay connected.

mod config;
mod exit;
mod live;
mod logging;
mod metrics;
mod page;
mod show;
mod trace;
mod verb;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::exit::Exit;
use crate::show::complain;

/// Move a running process tree to another host; its TCP peers stay connected.
#[derive(Debug, Parser)]
#[command(
    name = "migrate",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Exit codes: 0 moved; 1 internal; 2 usage; 3 preflight refused; 4 connect or \
                  authentication; 5 did not converge, source untouched; 6 failed and rolled back, the source runs; 7 undecided or failed \
                  after the commit, run `migrate recover`; 8 CRIU refused the dump, the source runs; 130 interrupted and \
                  rolled back."
)]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    migrate: verb::migrate::Args,
    #[command(flatten)]
    output: Output,
}

/// How much is said, and how.
#[derive(Debug, Clone, clap::Args)]
struct Output {
    /// One JSON object a line on standard output instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "json")]
    quiet: bool,
    /// Log to standard error; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Examine a tree and the destination; move nothing
    Check(verb::check::Args),
    /// The destination's side: started over SSH, or standing with mutual TLS
    Agent(verb::agent::Args),
    /// Checkpoint trees to a directory and keep their peers waiting, for a reboot
    Park(verb::park::Args),
    /// Bring parked trees back, on whatever kernel runs now; their peers go on
    Resume(verb::resume::Args),
    /// Early in a boot, before there is an address: let nothing answer for parked trees
    GuardBoot(verb::guard_boot::Args),
    /// Park trees, run the command that reboots, and resume them if it fails
    Maintenance(verb::maintenance::Args),
    /// Have a tree parked by every maintenance, under a name; or list those that are
    Mark(verb::mark::Args),
    /// Have it parked no more
    Unmark(verb::mark::UnmarkArgs),
    /// What is under way on this host, and what was left behind
    #[command(visible_alias = "list")]
    Status(verb::status::Args),
    /// The report of a migration: as text, as a page with charts, as a trace
    Report(verb::report::Args),
    /// Stop a migration before its commit; the tree runs on where it is
    Cancel(verb::cancel::Args),
    /// After a crash: finish or undo what was under way, and say where each tree runs
    Recover(verb::recover::Args),
    /// Remove gates whose owner is dead
    Unlock(verb::unlock::Args),
    /// Print the script that a shell completes this command by
    Completions(verb::manual::CompletionArgs),
    /// Write manual pages to a directory: for packages
    #[command(hide = true)]
    Manual(verb::manual::Args),
    /// Started by the others to clear up when they are killed
    #[command(hide = true)]
    Guard(verb::recover::GuardArgs),
    /// What an agent starts to put a copy's memory in place; of no use by hand
    #[command(hide = true)]
    KeepMemory(verb::keep_memory::Args),
    /// What a unit starts to take a moved tree in; of no use by hand
    #[command(hide = true)]
    Adopt(verb::adopt::Args),
}

/// The command line, with this host's defaults for those verbs that have any.
fn parsed() -> Result<Cli, String> {
    let cli = Cli::parse();
    if !matches!(&cli.verb, None | Some(Verb::Check(_))) {
        return Ok(cli);
    }
    let matches = config::applied(Cli::command())?.get_matches();
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
}

/// Standard output leads nowhere from now on, whatever a verb has to say.
fn hush() -> std::io::Result<()> {
    let nowhere = std::fs::File::options().write(true).open("/dev/null")?;
    Ok(nix::unistd::dup2_stdout(nowhere)?)
}

fn main() -> ExitCode {
    let cli = match parsed() {
        Ok(cli) => cli,
        Err(text) => {
            complain(&format!("migrate: {text}"));
            return Exit::Usage.into();
        }
    };
    let unattended = match &cli.verb {
        Some(Verb::Agent(agent)) => agent.stdio,
        Some(Verb::Guard(_) | Verb::KeepMemory(_)) => true,
        _ => false,
    };
    // What these write there may be for the other host.
    if cli.output.quiet
        && !unattended
        && let Err(error) = hush()
    {
        complain(&format!("migrate: could not be quiet: {error}"));
        return Exit::Internal.into();
    }
    logging::start(&cli.output, unattended);
    // What a file holds may be looked at by anybody who may read it.
    let reads_only = matches!(
        &cli.verb,
        Some(Verb::Report(_) | Verb::Completions(_) | Verb::Manual(_))
    );
    if !reads_only && !nix::unistd::geteuid().is_root() {
        complain(
            "migrate: this needs root: it freezes processes, loads eBPF programs and moves addresses",
        );
        complain("help: run it with sudo, or as root");
        return Exit::Usage.into();
    }
    if let Err(error) = migrate_session::secrets::leave_no_cores() {
        complain(&format!(
            "migrate: could not turn core dumps of its own off: {error}"
        ));
        return Exit::Internal.into();
    }
    if let Err(error) = migrate_session::secrets::stay_in_memory() {
        tracing::warn!(%error, "could not keep its own memory out of swap");
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("migrate: could not start: {error}"));
            return Exit::Internal.into();
        }
    };
    let output = cli.output;
    let exit = runtime.block_on(async move {
        match cli.verb {
            None => verb::migrate::run(cli.migrate, &output).await,
            Some(Verb::Check(args)) => verb::check::run(args, &output).await,
            Some(Verb::Agent(args)) => verb::agent::run(args).await,
            Some(Verb::Park(args)) => verb::park::run(args, &output).await,
            Some(Verb::Resume(args)) => verb::resume::run(args, &output).await,
            Some(Verb::GuardBoot(args)) => verb::guard_boot::run(&args).await,
            Some(Verb::Maintenance(args)) => verb::maintenance::run(args, &output).await,
            Some(Verb::Mark(args)) => verb::mark::run(&args),
            Some(Verb::Unmark(args)) => verb::mark::unmark(&args),
            Some(Verb::Status(args)) => verb::status::run(&args, &output).await,
            Some(Verb::Report(args)) => verb::report::run(&args, &output),
            Some(Verb::Completions(args)) => verb::manual::completions(&args),
            Some(Verb::Manual(args)) => verb::manual::run(&args),
            Some(Verb::Cancel(args)) => verb::cancel::run(&args).await,
            Some(Verb::Recover(args)) => verb::recover::run(&args, &output).await,
            Some(Verb::Guard(args)) => verb::recover::guard(args).await,
            Some(Verb::Unlock(args)) => verb::unlock::run(&args).await,
            Some(Verb::KeepMemory(args)) => verb::keep_memory::run(&args),
            Some(Verb::Adopt(args)) => verb::adopt::run(&args),
        }
    });
    // Tasks that only wait for a peer must not keep the process.
    runtime.shutdown_background();
    exit.into()
}
