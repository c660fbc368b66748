//! Lock keys and kinds. Prepared transactions keep locks across restarts and library updates: none of this may ever change.

#[pgrx::pg_schema]
mod tests {
    use crate::lock::{Mode, Tag};
    use crate::support::*;
    use pgrx::prelude::*;

    /// classid, objid, objsubid of our locks that this session holds, as pg_locks shows them.
    fn held() -> String {
        list(
            "SELECT format('%s/%s/%s', classid, objid, objsubid) FROM pg_locks
             WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND objsubid > 2 ORDER BY objsubid, classid, objid",
        )
    }

    #[pg_test]
    fn keys_are_those_of_the_first_release() {
        Tag::writer("").acquire(Mode::Shared);
        Tag::aggregate("t", "order", "42").acquire(Mode::Exclusive);
        Tag::unique_key("t", "email", "a").acquire(Mode::Exclusive);
        Tag::global_unique_key("email", "a").acquire(Mode::Exclusive);
        Tag::projection("p", "t").acquire(Mode::Exclusive);
        Tag::projection_all("p").acquire(Mode::Shared);
        Tag::lease("l").acquire(Mode::Exclusive);
        Tag::lease_waiter("l").acquire(Mode::Shared);
        assert_eq!(
            held(),
            "967321022/4022255791/4096,\
             2071857780/3222833563/12288,\
             1447467765/264710990/16384,\
             3962705585/1732144736/16384,\
             1577700434/749738149/20480,\
             2068778929/793168361/24576"
        );
    }

    #[pg_test]
    fn a_writers_start_carries_44_bits_of_its_ticket() {
        Tag::writer_start("", 0x0ABC_1234_5678).acquire(Mode::Shared);
        assert_eq!(
            list(
                "SELECT format('%s/%s', to_hex(objid::bigint), to_hex(objsubid::int)) FROM pg_locks
                 WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            ),
            "12345678/2abc"
        );
    }

    #[pg_test]
    fn parts_of_a_key_do_not_run_into_each_other() {
        assert_ne!(Tag::aggregate("", "ab", "c"), Tag::aggregate("", "a", "bc"));
        assert_ne!(
            Tag::unique_key("", "s", "v"),
            Tag::global_unique_key("s", "v")
        );
    }

    #[pg_test]
    fn advisory_locks_of_applications_have_other_tags() {
        run("SELECT pg_advisory_xact_lock(1), pg_advisory_xact_lock(1, 2)");
        assert_eq!(
            list(
                "SELECT objsubid FROM pg_locks
                 WHERE locktype = 'advisory' AND pid = pg_backend_pid() ORDER BY objsubid"
            ),
            "1,2"
        );
        assert_eq!(held(), "");
    }
}
