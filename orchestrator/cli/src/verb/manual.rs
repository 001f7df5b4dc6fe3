//! `migrate completions` and what packages are made of: all of it comes from the
//! command line's own definition.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;

use crate::Cli;
use crate::exit::Exit;
use crate::show::complain;

/// For which shell.
#[derive(Debug, clap::Args)]
pub struct CompletionArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Where manual pages go.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A directory that is there
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// Prints the script that a shell completes by.
pub fn completions(args: &CompletionArgs) -> Exit {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "migrate", &mut script);
    match io::stdout().lock().write_all(&script) {
        Ok(()) => Exit::Done,
        Err(_) => Exit::Internal,
    }
}

/// Writes the manual pages.
pub fn run(args: &Args) -> Exit {
    let mut command = Cli::command().mut_subcommands(with_aliases);
    command.build();
    match pages(&args.dir, &command, "migrate") {
        Ok(()) => Exit::Done,
        Err(error) => {
            complain(&format!(
                "migrate manual: could not write to {}: {error}",
                args.dir.display()
            ));
            complain("help: name a directory that is there and may be written to");
            Exit::Usage
        }
    }
}

/// Pages name no other names of a verb by themselves.
fn with_aliases(verb: Command) -> Command {
    let aliases: Vec<&str> = verb.get_visible_aliases().collect();
    if aliases.is_empty() {
        return verb;
    }
    let about = verb.get_about().map(ToString::to_string);
    let about = format!(
        "{} (also: {})",
        about.unwrap_or_default(),
        aliases.join(", ")
    );
    verb.about(about)
}

/// A page for a command, and one for each of its verbs that is not hidden.
fn pages(directory: &Path, command: &Command, name: &str) -> io::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.to_owned()))
        .section("8")
        .render(&mut page)?;
    fs::write(directory.join(format!("{name}.8")), page)?;
    let verbs = command.get_subcommands();
    let shown = verbs.filter(|verb| !verb.is_hide_set() && verb.get_name() != "help");
    for verb in shown {
        pages(directory, verb, &format!("{name}-{}", verb.get_name()))?;
    }
    Ok(())
}
