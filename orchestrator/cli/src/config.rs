//! `/etc/migrate/config.toml`: this host's own defaults for options of `migrate`
//! and `migrate check`. What stands on the command line has the last word.
//!
//! The file is only read for these two: an agent or a recovery must not fail over
//! it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Command;
use serde::Deserialize;

/// Where it is looked for.
pub const FILE: &str = "/etc/migrate/config.toml";

/// Names another file, which has to be there then.
pub const VARIABLE: &str = "MIGRATE_CONFIG";

/// The version of the format: raised when a key gets another meaning.
const VERSION: u32 = 1;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    version: u32,
    #[serde(default)]
    migrate: Defaults,
}

/// Defaults, by the long names of options.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Defaults {
    stdio: Option<String>,
    supervisor: Option<String>,
    adopt: Option<String>,
    engine: Option<String>,
    goal: Option<u8>,
    downtime_limit: Option<u64>,
    max_iterations: Option<u32>,
    timeout: Option<f64>,
    on_timeout: Option<String>,
    streams: Option<u32>,
    compress: Option<String>,
    bandwidth: Option<String>,
    restore: Option<String>,
    max_blackout: Option<f64>,
}

impl Defaults {
    /// Identifiers of arguments, and the values that were given.
    fn given(self) -> impl Iterator<Item = (&'static str, String)> {
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        let seconds = |seconds: Option<f64>| seconds.map(|seconds| seconds.to_string());
        [
            ("stdio", self.stdio),
            ("supervisor", self.supervisor),
            ("adopt", self.adopt),
            ("engine", self.engine),
            ("goal", number(self.goal.map(u64::from))),
            ("downtime_limit", number(self.downtime_limit)),
            ("max_iterations", number(self.max_iterations.map(u64::from))),
            ("timeout", seconds(self.timeout)),
            ("on_timeout", self.on_timeout),
            ("streams", number(self.streams.map(u64::from))),
            ("compress", self.compress),
            ("bandwidth", self.bandwidth),
            ("restore", self.restore),
            ("max_blackout", seconds(self.max_blackout)),
        ]
        .into_iter()
        .filter_map(|(id, value)| Some((id, value?)))
    }
}

/// The command with the host's defaults in the place of the built-in ones.
///
/// # Errors
///
/// The file is not understood; the text names it, the place and the way out.
pub fn applied(command: Command) -> Result<Command, String> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    let path = named.as_deref().unwrap_or(Path::new(FILE));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound && named.is_none() => {
            return Ok(command);
        }
        Err(error) => return Err(told(path, &error)),
    };
    with(command, &text).map_err(|error| told(path, &error))
}

fn told(path: &Path, why: &dyn std::fmt::Display) -> String {
    format!(
        "could not use {}: {}\nhelp: correct the file, or remove it for the built-in defaults",
        path.display(),
        why.to_string().trim_end()
    )
}

/// The same with the text of a file.
fn with(mut command: Command, text: &str) -> Result<Command, String> {
    #[derive(Deserialize)]
    struct Version {
        version: Option<u32>,
    }
    let wrong = |error: toml::de::Error| error.to_string();
    // First, for a newer one may well have keys that are unknown here.
    match toml::from_str::<Version>(text).map_err(wrong)?.version {
        Some(VERSION) => {}
        Some(other) => {
            return Err(format!(
                "it has version {other}, and this release knows {VERSION}"
            ));
        }
        None => return Err(format!("its first line has to be `version = {VERSION}`")),
    }
    let config: Config = toml::from_str(text).map_err(wrong)?;
    debug_assert_eq!(config.version, VERSION);
    for (id, value) in config.migrate.given() {
        let set = |command: Command, value: String| {
            if command
                .get_arguments()
                .any(|argument| argument.get_id() == id)
            {
                command.mut_arg(id, |argument| argument.default_value(value))
            } else {
                command
            }
        };
        let of_check = value.clone();
        command = set(command, value).mut_subcommand("check", |check| set(check, of_check));
    }
    // The values themselves are judged as if they had been typed.
    let complete = ["migrate", "--to", "host", "1"];
    match command.clone().try_get_matches_from(complete) {
        Ok(_) => Ok(command),
        Err(error) => {
            let said = error.render().to_string();
            let first = said.lines().next().unwrap_or_default();
            Err(first.trim_start_matches("error: ").to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _};

    use super::*;
    use crate::Cli;

    const DOCUMENTED: &str = include_str!("../../../dist/config.toml");

    fn parsed(text: &str, words: &[&str]) -> Result<Cli, String> {
        let command = with(Cli::command(), text)?;
        let matches = command
            .try_get_matches_from(words)
            .map_err(|error| error.to_string())?;
        Cli::from_arg_matches(&matches).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_sets_defaults_and_the_command_line_has_the_last_word() {
        let text = "version = 1\n[migrate]\ngoal = 80\nbandwidth = \"100M\"\nengine = \"full\"\n\
                    max-blackout = 2.5\non-timeout = \"cancel\"\n";
        let cli = parsed(text, &["migrate", "--to", "h", "7"]).unwrap();
        assert_eq!(
            (cli.migrate.rounds.goal, cli.migrate.max_blackout),
            (80, 2.5)
        );
        assert_eq!(cli.migrate.rounds.bandwidth, Some(100_000_000));
        let cli = parsed(text, &["migrate", "--to", "h", "--goal", "95", "7"]).unwrap();
        assert_eq!(cli.migrate.rounds.goal, 95);
        // What excludes an option on the command line does not exclude a default.
        assert!(parsed(text, &["migrate", "--postcopy", "--to", "h", "7"]).is_ok());
        let cli = parsed(text, &["migrate", "check", "7"]).unwrap();
        let Some(crate::Verb::Check(check)) = cli.verb else {
            panic!("{cli:?}");
        };
        assert_eq!(check.tree.engine, crate::verb::migrate::EngineName::Full);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, words) in [
            ("", "version = 1"),
            (
                "version = 2\nnew-key = 1",
                "it has version 2, and this release knows 1",
            ),
            ("version = 1\n[migrate]\ngaol = 90", "line 3"),
            ("version = 1\n[migrate]\ngaol = 90", "gaol"),
            ("version = 1\n[migrate]\ngoal = 'x'", "line 3"),
            ("version = 1\n[migrate]\ngoal = 190", "--goal"),
            ("version = 1\n[migrate]\nengine = 'best'", "best"),
            ("version = 1\n[agent]\n", "agent"),
        ] {
            let told = parsed(text, &["migrate", "--to", "h", "7"]).unwrap_err();
            assert!(told.contains(words), "{text:?}: {told}");
        }
    }

    #[test]
    fn what_the_file_documents_are_the_built_in_defaults() {
        // Every key is there, commented out, with the value that holds without it.
        let uncommented: String = DOCUMENTED
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let config: Config = toml::from_str(&uncommented).unwrap();
        let command = Cli::command();
        let mut documented = 0;
        for (id, value) in config.migrate.given() {
            let argument = command.get_arguments().find(|a| a.get_id() == id).unwrap();
            // What has no default, or one that depends on the machine, is an example.
            if !["timeout", "bandwidth", "streams"].contains(&id) {
                assert_eq!(argument.get_default_values(), [value.as_str()], "{id}");
            }
            documented += 1;
        }
        assert_eq!(documented, 14, "{uncommented}");
        with(command, &uncommented).unwrap();
    }
}
