//! Stopping a migration from outside.

use tokio::sync::watch;

use crate::error::Error;

/// A request to stop, shared by whoever may make it and whoever obeys it.
#[derive(Debug, Clone)]
pub struct Cancel {
    sender: watch::Sender<bool>,
}

impl Default for Cancel {
    fn default() -> Self {
        Self {
            sender: watch::Sender::new(false),
        }
    }
}

impl Cancel {
    /// Asks the migration to stop and roll back.
    pub fn cancel(&self) {
        self.sender.send_replace(true);
    }

    /// Whether somebody has asked.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        *self.sender.borrow()
    }

    /// Waits until somebody asks.
    pub async fn cancelled(&self) {
        let mut receiver = self.sender.subscribe();
        if receiver.wait_for(|asked| *asked).await.is_err() {
            // The sender lives in `self`, so this cannot happen; waiting for
            // ever is what "nobody asked" means.
            std::future::pending::<()>().await;
        }
    }
}

/// Asks the process that moves a tree to stop and roll back, as its user's
/// Ctrl-C would; whether it was still there.
///
/// # Errors
///
/// It cannot be asked.
pub fn ask(owner_pid: i32, owner_start_ticks: u64) -> Result<bool, Error> {
    Ok(migrate_proc::terminate(owner_pid, owner_start_ticks)?)
}
