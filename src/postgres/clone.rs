//! A copy of another member's data directory by pg_basebackup.

use crate::ports::{PostgresError, Progress, Source};

use super::programs::Run;
use super::{LocalServer, data_directory, files, roles, settings, start};

pub async fn clone_from(server: &LocalServer, source: &Source, progress: &Progress) -> Result<(), PostgresError> {
    let what = format!("clone {} at {}:{}", source.member, source.host, source.port);
    let layout = &server.layout;
    data_directory::require_empty(layout, &what)?;
    server.prepare_directories()?;
    start::write_passfile(server)?;
    data_directory::begin(layout, "clone")?;
    server.owner.directory(&layout.data_dir)?;

    let arguments = vec![
        "--pgdata".to_owned(),
        layout.data_dir.display().to_string(),
        "--dbname".to_owned(),
        // Never a name that can vote: with `-X stream` this connection reports flushed positions (finding 4).
        connection(server, source, roles::REPLICATION, &format!("pgvigil_clone_{}", server.config.name)),
        "--wal-method=stream".to_owned(),
        "--checkpoint=fast".to_owned(),
        "--no-password".to_owned(),
        "--progress".to_owned(),
    ];
    let program = server.program("pg_basebackup")?;
    let run = Run { what: &what, program, arguments, input: None, owner: &server.owner };
    run.succeed(|line| {
        if let Some((done, total)) = parse_progress(line) {
            progress.send_replace((Some(done), Some(total)));
        }
    })
    .await?;

    start::strip_auto_conf(server)?;
    start::write_standby_signal(server)?;
    // What was planted or parted here belonged to the directory that was here before.
    files::remove(&layout.planted)?;
    data_directory::finished(layout)
}

pub fn connection(server: &LocalServer, source: &Source, role: &str, name: &str) -> String {
    let port = source.port.to_string();
    let passfile = server.layout.passfile.display().to_string();
    settings::connection_string(&[
        ("host", &source.host),
        ("port", &port),
        ("user", role),
        ("dbname", "postgres"),
        ("application_name", name),
        ("passfile", &passfile),
        ("connect_timeout", "5"),
        ("keepalives_idle", "5"),
        ("keepalives_interval", "1"),
        ("keepalives_count", "4"),
        ("tcp_user_timeout", "10000"),
    ])
}

/// `12345/67890 kB (18%), 0/1 tablespace …` in bytes.
fn parse_progress(line: &str) -> Option<(u64, u64)> {
    // Without a terminal each report is a line, with one they are parted by carriage returns.
    let (numbers, _) = line.rsplit('\r').find(|part| part.contains(" kB"))?.trim_start().split_once(" kB")?;
    let (done, total) = numbers.split_once('/')?;
    Some((done.trim().parse::<u64>().ok()? * 1024, total.trim().parse::<u64>().ok()? * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read() {
        assert_eq!(parse_progress("  1024/4096 kB (25%), 0/1 tablespace"), Some((1 << 20, 4 << 20)));
        assert_eq!(parse_progress("waiting for checkpoint"), None);
    }
}
