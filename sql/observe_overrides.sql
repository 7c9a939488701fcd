-- Settings of roles and databases that weaken what a commit promises.
-- Role: any. Versions: 14 to 18. Columns: setting (name=value), database, role.
select
  s.setting,
  coalesce(d.datname, '') as database,
  coalesce(r.rolname, '') as role
from pg_db_role_setting c
  cross join lateral unnest(c.setconfig) as s(setting)
  left join pg_database d on d.oid = c.setdatabase
  left join pg_roles r on r.oid = c.setrole
where s.setting ~ '^(synchronous_commit|fsync|full_page_writes|zero_damaged_pages|ignore_checksum_failure)='
  and s.setting not in ('synchronous_commit=on', 'synchronous_commit=remote_apply')
order by 1, 2, 3;
