//! Who says for stock CRIU where the address is now, started off the clock.

use std::fs;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use migrate_net::Placement;
use migrate_test_hosts::{Host, INTERFACE};

/// First argument of a process that is one.
pub(crate) const ANNOUNCE: &str = "announce";

/// What it says when only the word is missing.
const READY: &[u8; 6] = b"ready\n";

/// A process on a host that waits for the word.
pub(crate) struct Announcer {
    child: Child,
    address: IpAddr,
}

impl Announcer {
    pub(crate) fn start(host: &Host, address: IpAddr) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let mut command: Command = host.command(own);
        command.args([ANNOUNCE, &address.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut ready = [0; READY.len()];
        let stdout = child.stdout.as_mut().context("the announcer's output")?;
        let read = stdout.read_exact(&mut ready);
        let this = Self { child, address };
        read.context("the announcer did not start")?;
        ensure!(&ready == READY, "the announcer said something else");
        Ok(this)
    }

    pub(crate) const fn address(&self) -> IpAddr {
        self.address
    }

    pub(crate) fn announce(mut self) -> anyhow::Result<()> {
        // The end of its input is the word.
        drop(self.child.stdin.take());
        ensure!(self.child.wait()?.success(), "the announcement failed");
        Ok(())
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process: says that it is ready, waits for the end of its input, and announces.
pub(crate) fn announce(address: Option<&str>) -> anyhow::Result<()> {
    let ip = address.context("no address")?.parse()?;
    let text = fs::read_to_string(format!("/sys/class/net/{INTERFACE}/address"))?;
    let mut mac = [0; 6];
    let bytes = text
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16));
    for (to, byte) in mac.iter_mut().zip(bytes) {
        *to = byte?;
    }
    let placement = Placement {
        ip,
        // Nothing is placed here.
        prefix_len: 0,
        ifindex: nix::net::if_::if_nametoindex(INTERFACE)?,
        interface: INTERFACE.to_owned(),
        mac: Some(mac),
    };
    io::Write::write_all(&mut io::stdout(), READY)?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(migrate_net::announce(&[placement])?)
}
