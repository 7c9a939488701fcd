//! The agent's side of the endpoint: finds the one that runs or starts one, and tells it what it has to know.
//!
//! One task, owned by the agent's process; it ends when told to. What it is dropped in the middle of does no harm: the
//! endpoint goes on, and the next agent begins with everything again.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::words::{Line, Settings, ToAgent, ToEndpoint, VERSION};
use crate::agent::status::Status;
use crate::config::LogConfig;
use crate::core::endpoint::Report;
use crate::core::route::{Routing, routing};

/// For the program to be read and to listen.
const START: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);
/// After an endpoint that ended or could not be started.
const AGAIN: Duration = Duration::from_millis(500);
/// It answers at once when it lives; one that does not is replaced.
const ANSWER: Duration = Duration::from_secs(2);
/// Closing a few hundred sockets.
const END: Duration = Duration::from_secs(3);

/// Where the present deadline page is, with its nonce.
pub type PageSource = Arc<dyn Fn() -> Option<(u64, OwnedFd)> + Send + Sync>;

pub struct Keeper {
    pub socket: PathBuf,
    pub settings: Settings,
    pub log: LogConfig,
    pub status: watch::Receiver<Option<Arc<Status>>>,
    pub page: PageSource,
    /// Shown by API and metrics; `None`: nobody answers.
    pub report: watch::Sender<Option<Report>>,
}

/// Why a conversation ended.
enum Ended {
    Told,
    Lost(String),
}

impl Keeper {
    /// Until `end`; with it the endpoint ends only if `finish` says so.
    pub async fn run(mut self, end: CancellationToken, finish: Arc<std::sync::atomic::AtomicBool>) {
        loop {
            match self.converse(&end).await {
                Ended::Told => {
                    if finish.load(std::sync::atomic::Ordering::SeqCst) {
                        dismiss(&self.socket).await;
                    }
                    return;
                }
                Ended::Lost(why) => {
                    self.report.send_replace(None);
                    warn!(why, "no endpoint: clients cannot come in; starting one");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = end.cancelled() => {}
            }
        }
    }

    async fn converse(&mut self, end: &CancellationToken) -> Ended {
        let line = match self.find_or_start().await {
            Ok(line) => line,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        match self.tell(&line, end).await {
            Ok(()) => Ended::Told,
            Err(error) => Ended::Lost(error.to_string()),
        }
    }

    async fn find_or_start(&self) -> io::Result<Line> {
        if let Ok(line) = Line::connect(&self.socket) {
            match timeout(ANSWER, line.hear::<ToAgent>()).await {
                Ok(Ok(Some((ToAgent::Hello { words: VERSION, version, pid, sessions }, _)))) => {
                    if version == env!("CARGO_PKG_VERSION") {
                        info!(pid, sessions, "taking over the endpoint that runs");
                    } else {
                        warn!(
                            pid,
                            sessions,
                            version,
                            "taking over an endpoint of another version: it is replaced when it ends"
                        );
                    }
                    return Ok(line);
                }
                Ok(Ok(Some((ToAgent::Hello { version, sessions, words, .. }, _)))) => {
                    warn!(
                        version,
                        words,
                        sessions,
                        "the endpoint that runs speaks another language: replacing it cuts its sessions"
                    );
                    drop(line);
                    dismiss(&self.socket).await;
                }
                _ => warn!("something holds the endpoint's socket and does not answer"),
            }
        }
        self.start().await
    }

    /// Not our child for long: it lives in a session of its own and outlives us.
    async fn start(&self) -> io::Result<Line> {
        let log_file = self.socket.with_extension("log");
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&log_file)?;
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.arg("endpoint").arg("--socket").arg(&self.socket).args(["--log-level", &self.log.level]);
        if self.log.json {
            command.arg("--log-json");
        }
        // Passwords in the agent's environment are not everybody's business; what it needs it is told.
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
        let mut child = command.spawn()?;
        let begun = Instant::now();
        while begun.elapsed() < START {
            if let Ok(line) = Line::connect(&self.socket)
                && let Ok(Ok(Some((ToAgent::Hello { pid, .. }, _)))) = timeout(ANSWER, line.hear::<ToAgent>()).await
            {
                info!(pid, log = %log_file.display(), "endpoint started");
                // Collected when it ends while we live.
                tokio::spawn(async move { child.wait().await });
                return Ok(line);
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("it ended at once ({status}); see {}", log_file.display())));
            }
            // A new process has nobody to tell that it listens.
            tokio::time::sleep(LOOK).await;
        }
        child.start_kill()?;
        Err(io::Error::other(format!("it does not listen after {START:?}")))
    }

    /// Everything once, then what is new.
    async fn tell(&mut self, line: &Line, end: &CancellationToken) -> io::Result<()> {
        line.say(&ToEndpoint::Hello { words: VERSION, version: env!("CARGO_PKG_VERSION").to_owned() }, None).await?;
        line.say(&ToEndpoint::Settings(Box::new(self.settings.clone())), None).await?;
        let mut told_page = None;
        let mut told: Option<Routing> = None;
        loop {
            // Before the route: a gate without a page stays shut.
            if let Some((nonce, file)) = (self.page)()
                && told_page != Some(nonce)
            {
                line.say(&ToEndpoint::Page { nonce }, Some(file.as_fd())).await?;
                told_page = Some(nonce);
            }
            let now = self.status.borrow_and_update().as_ref().map(|status| routing(&status.view));
            if now.is_some() && now != told {
                if let Some(routing) = &now {
                    line.say(&ToEndpoint::Routing(Box::new(routing.clone())), None).await?;
                }
                told = now;
            }
            // changed() and hear() are cancel-safe.
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() {
                    end.cancelled().await;
                },
                heard = line.hear::<ToAgent>() => match heard? {
                    Some((ToAgent::Report(report), _)) => {
                        self.report.send_replace(Some(*report));
                    }
                    Some((ToAgent::Hello { .. }, _)) => {}
                    None => return Err(io::Error::other("the endpoint ended")),
                },
                () = end.cancelled() => return Ok(()),
            }
        }
    }
}

/// Asks the endpoint of the socket to end, and waits until it has; nobody there is as good.
pub async fn dismiss(socket: &Path) {
    let asked = async {
        let line = Line::connect(socket)?;
        let hello = ToEndpoint::Hello { words: VERSION, version: env!("CARGO_PKG_VERSION").to_owned() };
        line.say(&hello, None).await?;
        line.say(&ToEndpoint::End, None).await?;
        while line.hear::<serde_json::Value>().await?.is_some() {}
        io::Result::Ok(())
    };
    match timeout(END, asked).await {
        Ok(Ok(())) => info!("the endpoint has ended"),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
        Ok(Err(error)) => warn!(%error, "end the endpoint"),
        Err(_) => warn!("the endpoint did not end within {END:?}"),
    }
}
