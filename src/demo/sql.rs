//! Connections to a member's PostgreSQL, each with its driver task, ended together.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};

/// Who connects, to which database.
#[derive(Clone, Debug)]
pub struct Login {
    pub user: String,
    pub password: String,
    pub database: String,
    pub application: String,
}

impl Login {
    pub fn superuser() -> Login {
        Login {
            user: "postgres".to_owned(),
            password: super::member::SUPERUSER_PASSWORD.to_owned(),
            database: "postgres".to_owned(),
            application: "pgvigil demo".to_owned(),
        }
    }

    /// The clients' own role and database.
    pub fn app() -> Login {
        Login {
            user: "app".to_owned(),
            password: "app".to_owned(),
            database: "app".to_owned(),
            application: "pgvigil demo writer".to_owned(),
        }
    }
}

pub struct Session {
    pub client: Client,
    driver: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl std::ops::Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

pub async fn connect(port: u16, login: &Login, within: Duration) -> Result<Session, String> {
    connect_to(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), login, within).await
}

/// One address, one try, one deadline.
pub async fn connect_to(at: SocketAddr, login: &Login, within: Duration) -> Result<Session, String> {
    let mut config = Config::new();
    config
        .host(at.ip().to_string())
        .port(at.port())
        .user(&login.user)
        .password(&login.password)
        .dbname(&login.database)
        .application_name(&login.application);
    match tokio::time::timeout(within, config.connect(NoTls)).await {
        Ok(Ok((client, connection))) => {
            // Owned by the session: it ends with the connection, or with the session's drop. Its error is every query's.
            let driver = tokio::spawn(async move {
                let _ = connection.await;
            });
            Ok(Session { client, driver })
        }
        Ok(Err(error)) => Err(sentence(&error)),
        Err(_) => Err(format!("no connection within {within:?}")),
    }
}

/// PostgreSQL's own words with the SQLSTATE, or the innermost cause.
pub fn sentence(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
