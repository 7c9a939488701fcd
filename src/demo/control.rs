//! Orders for a running demo from another terminal: one line to its socket, one answer back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use super::DemoError;
use super::live::Order;

/// In the base directory.
pub const SOCKET: &str = "control.sock";
/// An order has a few words.
const LONGEST: u64 = 256;
/// A switchover answers when it is done.
const ANSWER: Duration = Duration::from_secs(120);

/// An order with the way back for its answer.
pub struct Asked {
    pub order: Order,
    pub answer: oneshot::Sender<String>,
}

/// Accepts orders until it is dropped; one at a time, a second terminal waits.
pub async fn serve(base: PathBuf, asked: mpsc::Sender<Asked>) {
    let Ok(listener) = UnixListener::bind(base.join(SOCKET)) else { return };
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        // Whoever connects and says nothing must not hold up the next one for ever.
        let _ = tokio::time::timeout(ANSWER, answer(stream, &asked)).await;
    }
}

async fn answer(mut stream: UnixStream, asked: &mpsc::Sender<Asked>) -> Option<()> {
    let mut line = String::new();
    BufReader::new((&mut stream).take(LONGEST)).read_line(&mut line).await.ok()?;
    let text = match line.trim().parse::<Order>() {
        Ok(order) => {
            let (sender, receiver) = oneshot::channel();
            asked.send(Asked { order, answer: sender }).await.ok()?;
            receiver.await.unwrap_or_else(|_| "the demo is ending".to_owned())
        }
        Err(why) => why,
    };
    stream.write_all(text.as_bytes()).await.ok()?;
    stream.shutdown().await.ok()
}

/// Sends an order to the demo that runs on this machine.
pub async fn order(parent: Option<&Path>, text: &str) -> Result<String, DemoError> {
    // Wrong orders are answered here, whether a demo runs or not.
    text.parse::<Order>().map_err(|why| DemoError::failed("demo", why))?;
    let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
    let mut last = format!("no demo runs in {}: start one with `pgvigil demo`", parent.display());
    for socket in sockets(&parent) {
        match ask(&socket, text).await {
            Ok(answer) => return Ok(answer),
            Err(error) => last = format!("{}: {error}", socket.display()),
        }
    }
    Err(DemoError::failed("demo", last))
}

fn sockets(parent: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(super::cluster::BASE_PREFIX))
        .map(|entry| entry.path().join(SOCKET))
        .filter(|socket| socket.exists())
        .collect()
}

async fn ask(socket: &Path, text: &str) -> std::io::Result<String> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("{text}\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    tokio::time::timeout(ANSWER, exchange).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}
