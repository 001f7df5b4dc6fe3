//! CRIU's own ways to keep packets from a frozen tree, and what they leave.
//!
//! CRIU drops the packets of each connection by rules of a packet filter, which
//! it puts in while it dumps. It takes them away when the tree runs on, and
//! leaves them when the dump has succeeded, for then the tree's end would be
//! heard: [`NetworkLock::clear`] removes those (CRIU `criu/netfilter.c`).

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::CriuError;
use crate::locate::{Criu, run};
use crate::rpc::{NETWORK_LOCK_IPTABLES, NETWORK_LOCK_NFTABLES, NETWORK_LOCK_SKIP};

/// Asking CRIU for one feature takes as long as its check.
const FEATURE_LIMIT: Duration = Duration::from_secs(10);

/// How CRIU's rules are told from others: they let packets with this mark pass.
const MARK: &str = "--mark 0xc114";

/// Who keeps packets from a tree that is dumped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NetworkLock {
    /// The caller, or nobody.
    #[default]
    Caller,
    /// CRIU, by a table of its own.
    Nftables,
    /// CRIU, by two rules a connection.
    Iptables,
}

impl NetworkLock {
    pub(crate) const fn method(self) -> i32 {
        match self {
            Self::Caller => NETWORK_LOCK_SKIP,
            Self::Nftables => NETWORK_LOCK_NFTABLES,
            Self::Iptables => NETWORK_LOCK_IPTABLES,
        }
    }

    /// The programs that it needs.
    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Caller => &[],
            Self::Nftables => &["nft"],
            Self::Iptables => &[
                "iptables",
                "ip6tables",
                "iptables-save",
                "iptables-restore",
                "ip6tables-save",
                "ip6tables-restore",
            ],
        }
    }

    /// Whether this host and its CRIU can do it.
    ///
    /// # Errors
    ///
    /// [`CriuError::Lock`] says what is missing.
    pub async fn check(self, criu: &Criu) -> Result<(), CriuError> {
        for program in self.programs() {
            filter(program, &["--version"], None)?;
        }
        if self == Self::Nftables {
            let arguments = ["check", "--feature", "network_lock_nftables"];
            let answer = run(&criu.path, &arguments, FEATURE_LIMIT)
                .await
                .map_err(|source| failed("criu", source))?;
            if !answer.status.success() {
                let said = answer.lines.join("; ");
                return Err(failed("criu", io::Error::other(said)));
            }
        }
        Ok(())
    }

    /// Removes what CRIU has left for connections at these addresses; how many
    /// rules or tables those were. There may be none.
    ///
    /// # Errors
    ///
    /// [`CriuError::Lock`]; rules may be left then.
    pub fn clear(self, addresses: &[IpAddr]) -> Result<usize, CriuError> {
        match self {
            Self::Caller => Ok(0),
            Self::Nftables => clear_tables(addresses),
            Self::Iptables => {
                let four = clear_rules("iptables-save", "iptables-restore", addresses)?;
                Ok(four + clear_rules("ip6tables-save", "ip6tables-restore", addresses)?)
            }
        }
    }
}

fn clear_tables(addresses: &[IpAddr]) -> Result<usize, CriuError> {
    let mut removed = 0;
    let tables = filter("nft", &["list", "tables", "inet"], None)?;
    for name in tables.lines().filter_map(criu_table) {
        let table = filter("nft", &["list", "table", "inet", name], None)?;
        if names_any(&table, addresses) {
            filter("nft", &["delete", "table", "inet", name], None)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The name of a table of CRIU's in a line of `nft list tables`.
fn criu_table(line: &str) -> Option<&str> {
    let name = line.trim().strip_prefix("table inet ")?;
    name.starts_with("CRIU-").then_some(name)
}

/// Whether one of the addresses stands in the text, and not as part of another.
fn names_any(text: &str, addresses: &[IpAddr]) -> bool {
    let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    text.split(|c: char| !(c.is_ascii_hexdigit() || c == '.' || c == ':'))
        .any(|word| addresses.iter().any(|address| address == word))
}

fn clear_rules(save: &str, restore: &str, addresses: &[IpAddr]) -> Result<usize, CriuError> {
    let rules = filter(save, &["-t", "filter"], None)?;
    let (orders, removed) = removal(&rules, addresses);
    if removed > 0 {
        filter(restore, &["--noflush"], Some(&orders))?;
    }
    Ok(removed)
}

/// What `iptables-restore` has to be told to remove CRIU's rules, and how many
/// those are.
fn removal(rules: &str, addresses: &[IpAddr]) -> (String, usize) {
    let mut orders = "*filter\n".to_owned();
    let mut removed = 0;
    for line in rules.lines() {
        if let Some(rule) = line.strip_prefix("-A ")
            && rule.contains(MARK)
            && rule.ends_with("-j DROP")
            && names_any(rule, addresses)
        {
            orders += "-D ";
            orders += rule;
            orders.push('\n');
            removed += 1;
        }
    }
    orders += "COMMIT\n";
    (orders, removed)
}

/// Runs a program of the packet filter. It does what it is told and ends.
fn filter(program: &str, arguments: &[&str], input: Option<&str>) -> Result<String, CriuError> {
    let attempt = || {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = attempt().map_err(|source| failed(program, source))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(program, io::Error::other(said)))
}

fn failed(program: &str, source: io::Error) -> CriuError {
    CriuError::Lock {
        program: PathBuf::from(program),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_of_criu_for_the_address_are_removed() {
        let ours = "-A INPUT -s 10.77.0.1/32 -d 10.77.0.100/32 -p tcp -m mark ! --mark 0xc114 \
                    -m tcp --sport 4000 --dport 6379 -j DROP";
        let rules = format!(
            "*filter\n:INPUT ACCEPT [0:0]\n{ours}\n{}\n{}\n-A INPUT -s 10.77.0.100/32 -j DROP\nCOMMIT\n",
            ours.replace("10.77.0.100", "10.77.0.10"),
            ours.replace("10.77.0.100", "110.77.0.100"),
        );
        let (orders, removed) = removal(&rules, &["10.77.0.100".parse().unwrap()]);
        assert_eq!(removed, 1);
        assert_eq!(orders, format!("*filter\n-D {}\nCOMMIT\n", &ours[3..]));
        assert_eq!(removal(&rules, &[]).1, 0);
    }

    #[test]
    fn tables_of_criu_are_known_by_name_and_address() {
        assert_eq!(criu_table("table inet CRIU-77"), Some("CRIU-77"));
        assert_eq!(criu_table("table inet filter"), None);
        let table = "set conns6 { elements = { fd77::100 . 6379 . fd77::1 . 4000 } }";
        let at = |address: &str| names_any(table, &[address.parse().unwrap()]);
        assert!(at("fd77::100") && at("fd77::1"));
        assert!(!at("fd77::10") && !at("77::100"));
    }
}
