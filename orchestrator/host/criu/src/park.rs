//! A restore that is ordered before its images have come.
//!
//! The inventory is the first image that CRIU opens, after it has read its
//! options, asked the kernel what it can do and parsed the vdso (`cr_restore_tasks`
//! in CRIU's `criu/cr-restore.c`). Where a FIFO stands in its place CRIU does all
//! that and waits; written, it lets CRIU go on. Without a cache of the kernel's
//! answers that was 60 to 80 ms of work on two busy cores, which is then done before
//! the tree freezes; with one it is little.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Action, CriuError};
use crate::images::{INVENTORY, ImageDir};
use crate::session::Session;
use crate::worker::{RestoreOptions, Worker};

/// How long CRIU may take until it opens the inventory. It has begun to work
/// long before anybody waits for it.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Between two looks: the kernel tells nobody that a FIFO has got a reader, but
/// one who waits inside `open`, and that cannot be given up.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// What a FIFO takes in one piece (`PIPE_BUF` counts pages: 16 of them is its
/// usual size). An inventory has some hundred bytes.
const INVENTORY_BYTES_MAX: usize = 64 << 10;

/// A CRIU that has its order and waits for images.
///
/// It is killed when dropped: it has made nothing by then.
#[derive(Debug)]
pub struct ParkedRestore {
    session: Session,
    options: RestoreOptions,
}

impl Worker {
    /// Orders a restore from a directory whose images are still to come.
    ///
    /// # Errors
    ///
    /// The order could not be sent; the directory has images already.
    pub async fn park(
        self,
        options: RestoreOptions,
        images: &mut ImageDir,
    ) -> Result<ParkedRestore, CriuError> {
        images.park()?;
        let mut session = self.restore(&options).await?;
        session.expend(true);
        Ok(ParkedRestore { session, options })
    }
}

impl ParkedRestore {
    /// What was ordered.
    #[must_use]
    pub fn options(&self) -> &RestoreOptions {
        &self.options
    }

    /// The PID of the CRIU that waits.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.session.pid()
    }

    /// Lets CRIU go on. All images must be in place.
    ///
    /// # Errors
    ///
    /// The inventory has not come; CRIU has died, or has not come as far as to
    /// ask for it. Then nothing was restored: after [`ImageDir::unpark`] another
    /// worker can do it.
    pub async fn release(mut self, images: &ImageDir) -> Result<Session, CriuError> {
        let held = images.held_inventory();
        let inventory =
            fs::read(&held).map_err(|source| CriuError::image("read", &held, source))?;
        if inventory.len() > INVENTORY_BYTES_MAX {
            return Err(CriuError::ImageData {
                what: format!("an inventory of {} bytes", inventory.len()),
            });
        }
        let path = images.path().join(INVENTORY);
        let ends_at = Instant::now() + OPEN_LIMIT;
        let mut fifo = loop {
            let opened = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path);
            match opened {
                Ok(fifo) => break fifo,
                // Nobody reads yet.
                Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => {}
                Err(source) => return Err(CriuError::image("open", path, source)),
            }
            if !self.session.alive() || Instant::now() > ends_at {
                return Err(CriuError::Silent {
                    action: Action::Restore,
                    within: OPEN_LIMIT,
                });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        if let Err(source) = fifo.write_all(&inventory) {
            // A part of an inventory is none, and CRIU has made nothing of it.
            self.session.kill().await?;
            return Err(CriuError::image("write", path, source));
        }
        // From here on CRIU makes processes, which would not be killed with it.
        self.session.expend(false);
        Ok(self.session)
    }
}

/// Lets a CRIU go that waits in this directory for an owner who has died: it
/// finds an empty inventory and ends. Nothing happens where none waits.
pub fn dismiss_parked(images: &Path) {
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(images.join(INVENTORY));
    // Closed again at once. An inventory that has come is no FIFO and is not
    // touched by being opened.
    drop(opened);
}

impl ImageDir {
    /// The name under which an inventory waits for its FIFO. No image has it.
    const HELD: &str = "inventory.held";

    /// Makes CRIU wait for the inventory.
    fn park(&mut self) -> Result<(), CriuError> {
        let path = self.path().join(INVENTORY);
        self.hold_inventory(Self::HELD)?;
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)
            .map_err(|errno| CriuError::image("create", &path, errno.into()))
    }

    /// Where the inventory is while a restore is parked.
    fn held_inventory(&self) -> std::path::PathBuf {
        self.path().join(Self::HELD)
    }

    /// Puts the inventory where a restore that was not parked finds it. To be
    /// called when all images have come.
    ///
    /// # Errors
    ///
    /// It cannot be moved.
    pub fn unpark(&mut self) -> Result<(), CriuError> {
        let (held, path) = (self.held_inventory(), self.path().join(INVENTORY));
        match fs::rename(&held, &path) {
            Ok(()) => Ok(()),
            // It was never parked, or is in its place again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(CriuError::image("move", &held, source)),
        }
    }
}
