//! pgvigil's own roles, and the making of a new cluster. Clear passwords never reach SQL: PostgreSQL gets SCRAM verifiers.

use postgres_protocol::password::scram_sha_256;

use crate::config::Secret;
use crate::core::plan::SyncRule;
use crate::ports::PostgresError;

use super::LocalServer;
use super::controldata::ControlFile;
use super::files::{broken, remove};
use super::programs::Run;
use super::settings::Dynamic;
use super::{data_directory, start};

/// The agent's own role: statistics, promotion, slots; no superuser.
pub const AGENT: &str = "pgvigil";
/// Streams WAL and copies data directories.
pub const REPLICATION: &str = "pgvigil_replication";
/// Reads files for pg_rewind.
pub const REWIND: &str = "pgvigil_rewind";
/// Reads, by one function, what the endpoint needs to let clients in.
pub const ENDPOINT: &str = "pgvigil_endpoint";

/// SQL that makes the roles in the database `postgres`; safe to run again (it also sets a new password).
pub fn script(password: &Secret, major: u32) -> String {
    // One salt for each role: equal verifiers would show that the passwords are equal.
    let mut sql = include_str!("../../sql/roles.sql").to_owned();
    sql.push_str(include_str!("../../sql/roles_endpoint.sql"));
    for role in [AGENT, REPLICATION, REWIND, ENDPOINT] {
        sql = sql.replace(&format!("<verifier of {role}>"), &scram_sha_256(password.expose().as_bytes()));
    }
    if major >= 15 {
        sql.push_str(include_str!("../../sql/roles_15.sql"));
    }
    if major >= 16 {
        sql.push_str(include_str!("../../sql/roles_16.sql"));
    }
    sql
}

/// initdb, roles, `standby.signal`. Opens no server: roles are made in single-user mode.
pub async fn bootstrap(server: &LocalServer) -> Result<u64, PostgresError> {
    let what = "create a new cluster";
    let layout = &server.layout;
    data_directory::require_empty(layout, what)?;
    server.prepare_directories()?;
    data_directory::begin(layout, "initdb")?;
    server.owner.directory(&layout.data_dir)?;

    let password_file = layout.directory.join("initdb.password");
    server.owner.write(
        &password_file,
        &format!("{}\n", server.config.postgresql.superuser_password.expose()),
        false,
    )?;
    let made = initdb(server, &password_file.display().to_string()).await;
    remove(&password_file)?;
    made?;

    // With our own configuration, so that the control file has its values from the beginning (max_connections below
    // initdb's would be less than what a standby needs).
    // Nobody is awaited here only: a commit in single-user mode has nobody who could answer. Each start names nobody.
    start::write_dynamic(server, &Dynamic::alone(SyncRule::Cleared))?;
    start::write_configuration(server).await?;
    let major = server.major().await?;
    single_user(server, "postgres", script(&server.config.postgresql.internal_password, major)).await?;
    // In every database that is there, and so in all that are made from them: a cancelled wait for standbys looks like
    // success to the client (protocol §4).
    for database in ["postgres", "template1", "template0"] {
        single_user(server, database, include_str!("../../sql/revoke_cancel.sql").to_owned()).await?;
    }
    start::write_standby_signal(server)?;
    let control = ControlFile::read(&layout.data_dir).map_err(|why| broken(what, why))?;
    data_directory::finished(layout)?;
    Ok(control.system_identifier)
}

async fn initdb(server: &LocalServer, password_file: &str) -> Result<String, PostgresError> {
    let postgresql = &server.config.postgresql;
    let mut arguments: Vec<String> = vec![
        "--pgdata".into(),
        postgresql.data_dir.display().to_string(),
        "--username".into(),
        postgresql.superuser.clone(),
        "--pwfile".into(),
        password_file.into(),
        "--auth-local=scram-sha-256".into(),
        "--auth-host=scram-sha-256".into(),
        "--data-checksums".into(),
        "--encoding=UTF8".into(),
        "--locale=C.UTF-8".into(),
    ];
    arguments.extend(postgresql.initdb_options.iter().cloned());
    let program = server.program("initdb")?;
    Run { what: "initdb", program, arguments, input: None, owner: &server.owner }.succeed(|_| ()).await
}

/// Runs a script in a server that nobody can connect to. The first error ends it.
async fn single_user(server: &LocalServer, database: &str, sql: String) -> Result<String, PostgresError> {
    let what = format!("run the script for roles and rights in database `{database}`");
    let arguments = vec![
        "--single".into(),
        "-j".into(),
        "-D".into(),
        server.layout.data_dir.display().to_string(),
        "-c".into(),
        format!("config_file={}", server.layout.main_file.display()),
        "-c".into(),
        "exit_on_error=on".into(),
        "-c".into(),
        "log_min_messages=warning".into(),
        database.into(),
    ];
    // With -j a statement ends at a semicolon followed by an empty line.
    let input = Some(format!("{};\n\n", statements(&sql).join(";\n\n")));
    Run { what: &what, program: server.program("postgres")?, arguments, input, owner: &server.owner }
        .succeed(|_| ())
        .await
}

/// A script as its statements, without comment lines. Statements that hold semicolons themselves (DO blocks) end with a
/// line of their own, as in the files under `sql/`: the split is at semicolons that end a line outside `$$`.
pub fn statements(script: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut statement = String::new();
    let mut quoted = false;
    for line in script.lines().filter(|line| !line.trim_start().starts_with("--")) {
        if line.matches("$$").count() % 2 == 1 {
            quoted = !quoted;
        }
        statement.push_str(line);
        if !quoted && line.trim_end().ends_with(';') {
            all.push(statement.trim().trim_end_matches(';').to_owned());
            statement.clear();
        } else {
            statement.push('\n');
        }
    }
    if !statement.trim().is_empty() {
        all.push(statement.trim().to_owned());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_split_outside_dollar_quotes() {
        let script = "-- header\nselect 1;\ndo $$\nbegin\n  perform 1;\nend\n$$;\nselect 2;\n";
        assert_eq!(statements(script), ["select 1", "do $$\nbegin\n  perform 1;\nend\n$$", "select 2"]);
    }

    #[test]
    fn the_script_holds_verifiers_and_no_password() {
        let script = script(&Secret::new("geheim"), 18);
        assert!(!script.contains("geheim") && !script.contains("<verifier"));
        assert_eq!(script.matches("SCRAM-SHA-256$").count(), 4);
    }
}
