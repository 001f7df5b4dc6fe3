//! `hosts up | exec NAME [--] CMD... | down`

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use migrate_test_hosts::{HostName, Lab, WORKLOAD_V4};

#[derive(Args)]
pub(crate) struct Which {
    /// Which set of hosts; several can be up side by side.
    #[arg(long, value_name = "NAME", default_value = "demo")]
    lab: String,
}

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Bring host1, host2 and client up. Nothing happens if they are.
    Up {
        #[command(flatten)]
        which: Which,
    },
    /// Run a command in a host. Its exit status and standard streams are the command's.
    Exec {
        #[command(flatten)]
        which: Which,
        /// host1, host2 or client.
        #[arg(value_name = "NAME")]
        host: String,
        /// The command and its arguments.
        #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
        #[arg(allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Take the hosts down, with everything in them. Nothing happens if they are not up.
    Down {
        #[command(flatten)]
        which: Which,
    },
}

pub(crate) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Up { which } => {
            let lab = Lab::up(&which.lab)?;
            for name in HostName::ALL {
                let host = lab.host(name);
                println!("{name:<8} {:<12} {}", host.ipv4().to_string(), host.ipv6());
            }
            println!("{:<8} {WORKLOAD_V4} (on host1 at first)", "workload");
            Ok(())
        }
        Verb::Exec {
            which,
            host,
            command,
        } => {
            let host = host.parse::<HostName>()?;
            let lab = Lab::attach(&which.lab)?;
            let (program, arguments) = command.split_first().context("no command is given")?;
            // Takes this process's place, so that signals and the exit status pass through.
            let error = lab.host(host).command(program).args(arguments).exec();
            Err(error).with_context(|| format!("could not enter {host}"))
        }
        Verb::Down { which } => Ok(Lab::down(&which.lab)?),
    }
}
