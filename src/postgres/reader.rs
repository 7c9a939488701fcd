//! Reads of PGDATA that the decision loop waits for: on a thread of their own and with a deadline. A read that hangs in the
//! disk keeps that thread, and nobody else; until it returns everything that is asked of it is late, which is an answer (S12).

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

type Job = Box<dyn FnOnce() + Send>;

/// More than a round asks for at once; what does not fit waits behind a read that hangs.
const QUEUE: usize = 8;

pub struct Reader {
    jobs: SyncSender<Job>,
}

impl Reader {
    pub fn start() -> std::io::Result<Reader> {
        let (jobs, queue) = sync_channel::<Job>(QUEUE);
        // Ends with the reader, or when the disk lets it go.
        thread::Builder::new().name("pgdata".to_owned()).spawn(move || queue.iter().for_each(|job| job()))?;
        Ok(Reader { jobs })
    }

    /// The error is a sentence. What is late is not done any more when its turn comes.
    pub async fn read<T: Send + 'static>(
        &self,
        deadline: Instant,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let (sender, answer) = oneshot::channel();
        let job = move || {
            if !sender.is_closed() {
                // Whoever asked may have given up meanwhile.
                let _ = sender.send(read());
            }
        };
        let late = || "a read of the data directory does not return: its disk hangs".to_owned();
        self.jobs.try_send(Box::new(job)).map_err(|_| late())?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err("the thread that reads the data directory is gone".to_owned()),
            Err(_) => Err(late()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_read_that_hangs_makes_others_late_and_ends_nothing() {
        let reader = Reader::start().unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        let (go_on, hangs) = std::sync::mpsc::channel::<()>();
        assert!(reader.read(soon(), move || hangs.recv()).await.is_err());
        for _ in 0..2 * QUEUE {
            assert!(reader.read(soon(), || 1).await.unwrap_err().contains("hangs"));
        }
        go_on.send(()).unwrap();
        let long = Instant::now() + Duration::from_secs(20);
        let answer = loop {
            // The queue empties without being heard of.
            match reader.read(long, || 2).await {
                Ok(answer) => break answer,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert_eq!(answer, 2);
    }
}
