//! Roles from the PostgreSQL of this host, primary or standby: over its socket, as a role that may call one function.

use std::path::PathBuf;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::config::Secret;

use super::cache::RoleSource;
use super::roles::{RoleRecord, Roles};

/// Made by the agent with the others (`sql/roles_endpoint.sql`).
const ROLE: &str = "pgvigil_endpoint";

pub struct LocalRoles {
    socket_dir: PathBuf,
    port: u16,
    password: Secret,
    /// Kept from one question to the next. Held over a question: there is one at a time (`RoleCache`).
    session: Mutex<Option<Session>>,
}

struct Session {
    client: Client,
    connection: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl LocalRoles {
    pub fn new(socket_dir: PathBuf, port: u16, password: Secret) -> LocalRoles {
        LocalRoles { socket_dir, port, password, session: Mutex::new(None) }
    }

    pub async fn records(&self) -> Result<Vec<RoleRecord>, String> {
        // Taken out for the time of the question: dropped in its middle, or failed, the session is not used again.
        let mut kept = self.session.lock().await;
        let session = match kept.take().filter(|session| !session.client.is_closed()) {
            Some(session) => session,
            None => self.open().await.map_err(shown)?,
        };
        let rows = session.client.query(include_str!("../../../sql/login_roles.sql"), &[]).await.map_err(shown)?;
        *kept = Some(session);
        rows.iter()
            .map(|row| {
                Ok(RoleRecord {
                    name: row.try_get("name")?,
                    stored: row.try_get("stored")?,
                    valid_until_ms: row.try_get("valid_until_ms")?,
                    can_login: row.try_get("can_login")?,
                    superuser: row.try_get("superuser")?,
                })
            })
            .collect::<Result<_, tokio_postgres::Error>>()
            .map_err(shown)
    }

    async fn open(&self) -> Result<Session, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.socket_dir).port(self.port).user(ROLE).dbname("postgres");
        config.password(self.password.expose()).application_name("pgvigil endpoint: roles");
        // Nothing that an operator's setting could get between (CVE-2025-12819), and never left waiting.
        config.options("-c search_path=pg_catalog -c statement_timeout=2s -c lock_timeout=1s");
        let (client, connection) = config.connect(NoTls).await?;
        let connection = tokio::spawn(async move {
            // What ends it is seen by the next question.
            let _ = connection.await;
        });
        Ok(Session { client, connection })
    }
}

/// The whole chain: PostgreSQL's own sentence is behind "db error".
fn shown(error: tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) if matches!(said.code().code(), "42883" | "3F000" | "42501" | "28P01") => format!(
            "{} (SQLSTATE {}): run sql/roles_endpoint.sql as superuser in the database postgres of the primary",
            said.message(),
            said.code().code()
        ),
        Some(said) => format!("{} (SQLSTATE {})", said.message(), said.code().code()),
        None => std::error::Error::source(&error).map_or_else(|| error.to_string(), |why| format!("{error}: {why}")),
    }
}

#[async_trait]
impl RoleSource for LocalRoles {
    async fn fetch(&self) -> Result<Roles, String> {
        self.records().await.map(Roles::new)
    }

    fn name(&self) -> String {
        format!("{}/.s.PGSQL.{}", self.socket_dir.display(), self.port)
    }
}
