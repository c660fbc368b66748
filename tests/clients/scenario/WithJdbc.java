// The scenario with PgJDBC. Other languages' programs beside it do the same: see ../test_scenario.py.
// Needs no build: java -cp /usr/share/java/postgresql.jar WithJdbc.java 6

import java.math.BigDecimal;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import org.postgresql.util.PSQLException;

public class WithJdbc {
    static final Set<String> RETRY = Set.of("40001", "40P01", "55P03"); // the whole transaction, as it is

    static Connection connect() throws SQLException {
        // No prepared statements in the server: PgBouncer may give each transaction another session.
        return DriverManager.getConnection(String.format(
            "jdbc:postgresql://%s:%s/%s?user=%s&prepareThreshold=0",
            System.getenv("PGHOST"), System.getenv("PGPORT"), System.getenv("PGDATABASE"), System.getenv("PGUSER")));
    }

    interface Body {
        void run() throws SQLException;
    }

    record Batch(List<BigDecimal> positions, boolean more) {}

    static class Client {
        final int number;
        Connection connection = connect();

        Client(int number) throws SQLException {
            this.number = number;
        }

        // PgJDBC sends a String as varchar, so the query says what it is: ?::jsonb, ?::interval, ?::uuid.
        PreparedStatement prepare(String query, Object... parameters) throws SQLException {
            PreparedStatement statement = connection.prepareStatement(query);
            for (int n = 0; n < parameters.length; n++) {
                statement.setObject(n + 1, parameters[n]);
            }
            return statement;
        }

        void execute(String query, Object... parameters) throws SQLException {
            try (PreparedStatement statement = prepare(query, parameters)) {
                statement.execute();
            }
        }

        /** The columns of the first row, or null. */
        Object[] row(String query, Object... parameters) throws SQLException {
            try (PreparedStatement statement = prepare(query, parameters); ResultSet result = statement.executeQuery()) {
                if (!result.next()) {
                    return null;
                }
                Object[] columns = new Object[result.getMetaData().getColumnCount()];
                for (int n = 0; n < columns.length; n++) {
                    columns[n] = result.getObject(n + 1);
                }
                return columns;
            }
        }

        Object value(String query, Object... parameters) throws SQLException {
            return row(query, parameters)[0];
        }

        void transaction(Body body) throws SQLException {
            connection.setAutoCommit(false);
            try {
                body.run();
                connection.commit();
            } catch (SQLException error) {
                connection.rollback();
                throw error;
            } finally {
                connection.setAutoCommit(true);
            }
        }

        void record(String what, Object outcome) throws SQLException {
            execute("INSERT INTO outcomes VALUES (?, ?, ?)", number, what, outcome);
        }

        /** Does what must fail, and records the SQLSTATE. */
        void refused(String what, String query, Object... parameters) throws SQLException {
            String outcome = "accepted";
            try {
                execute(query, parameters);
            } catch (SQLException error) {
                outcome = error.getSQLState();
            }
            record(what, outcome);
        }

        /** A deposit, once, however often it is pushed: it has an id of its own. */
        void push(String account, long expectedSequence, int event) throws SQLException {
            String deposit = String.format("""
                [{"aggregate_type": "account", "aggregate_id": "%s", "event_type": "deposited", "expected_sequence": %d,
                  "event_id": "00000000-0000-4000-8000-%06d%06d", "payload": {"amount": %d}}]""",
                account, expectedSequence, number, event, 10 * number + event);
            execute("SELECT position, sequence FROM lockstep.push_events(?::jsonb)", deposit);
        }

        long sequence(String account) throws SQLException {
            return (long) value("SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', ?)", account);
        }

        void pushes() throws SQLException {
            String own = "own " + number;
            push(own, 0, 1);
            // The answer to a push is lost with the connection: connect and push the same again.
            try {
                execute("SELECT pg_terminate_backend(pg_backend_pid())");
            } catch (SQLException error) {
                connection = connect();
            }
            try {
                push(own, 0, 1);
            } catch (PSQLException error) {
                if (!"events_tenant_event_id_key".equals(error.getServerErrorMessage().getConstraint())) {
                    throw error;
                }
                record("the same push again", error.getSQLState());
            }
            // Somebody was faster: read, decide, push again.
            try {
                push(own, 0, 2);
            } catch (SQLException error) {
                if (!"LS001".equals(error.getSQLState())) {
                    throw error;
                }
                record("push", error.getSQLState());
                push(own, sequence(own), 2);
            }
            for (boolean pushed = false; !pushed; ) {
                try {
                    push("shared", sequence("shared"), 3);
                    pushed = true;
                } catch (SQLException error) {
                    if (!"LS001".equals(error.getSQLState())) {
                        throw error;
                    }
                }
            }
        }

        /** Within a transaction: the events of a batch, applied, and whether there are more. */
        Batch claimAndApply() throws SQLException {
            String claim = "SELECT position, aggregate_id, (payload ->> 'amount')::numeric AS amount"
                + " FROM lockstep.projection_claim('balances', max_events => 3, wait => true)";
            List<BigDecimal> positions = new ArrayList<>();
            try (PreparedStatement statement = prepare(claim); ResultSet events = statement.executeQuery()) {
                while (events.next()) {
                    positions.add(events.getBigDecimal("position"));
                    execute("INSERT INTO applied VALUES (?)", events.getBigDecimal("position"));
                    execute("INSERT INTO balances AS b VALUES (?, ?)"
                        + " ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total",
                        events.getString("aggregate_id"), events.getBigDecimal("amount"));
                }
            }
            return new Batch(positions, (boolean) value("SELECT more FROM lockstep.projection_claim_state('balances')"));
        }

        void projection() throws SQLException {
            refused("advance without a claim", "SELECT lockstep.projection_advance('balances')");
            connection.setAutoCommit(false);
            claimAndApply();
            connection.rollback(); // the worker dies: all of this comes again
            connection.setAutoCommit(true);
            boolean[] more = {true};
            while (more[0]) {
                transaction(() -> {
                    Batch batch = claimAndApply();
                    more[0] = batch.more();
                    if (!batch.positions().isEmpty()) {
                        BigDecimal last = batch.positions().get(batch.positions().size() - 1);
                        check(last.equals(value("SELECT lockstep.projection_advance('balances', up_to => ?)", last)));
                    }
                });
            }
        }

        void lease() throws SQLException, InterruptedException {
            String acquire = "SELECT acquired, token FROM lockstep.lease_acquire('leader', ?, ttl => ?::interval)";
            Object[] held = row(acquire, "client " + number, "600 seconds");
            while (!(boolean) held[0]) {
                Thread.sleep(10);
                held = row(acquire, "client " + number, "600 seconds");
            }
            Object token = held[1];
            transaction(() -> {
                execute("SELECT lockstep.lease_guard('leader', ?)", token);
                execute("INSERT INTO led VALUES (?, ?)", number, token);
            });
            check((boolean) value("SELECT lockstep.lease_release('leader', ?)", token));
            // From here on it is a former holder.
            refused("guard", "SELECT lockstep.lease_guard('leader', ?)", token);
            try {
                transaction(() -> {
                    execute("INSERT INTO led VALUES (?, NULL)", number);
                    execute("SELECT lockstep.lease_guard_at_commit('leader', ?)", token);
                });
            } catch (SQLException error) {
                record("guard at commit", error.getSQLState());
            }
        }

        void sync() throws SQLException {
            String resource = "repository " + number;
            String begin = "SELECT status, token FROM lockstep.replica_sync_begin(?, 'copy', ?, ttl => ?::interval)";
            String finish = "SELECT lockstep.replica_sync_finish(?, 'copy', ?)";
            execute("SELECT lockstep.resource_create(?, ARRAY['primary'])", resource);
            Object[] first = row(begin, resource, "first", "1 microsecond");
            Object[] second = row(begin, resource, "second", "1 minute");
            check(first[0].equals("started") && second[0].equals("started"));
            record("sync of the first worker", value(finish, resource, first[1]));
            record("sync of the second worker", value(finish, resource, second[1]));
            refused("copy to a current one", "SELECT lockstep.generation_replicated(?, 'primary', 'copy')", resource);
            execute("SELECT lockstep.generation_increment(?)", resource); // the truth lives elsewhere: both are outdated
            refused("write", "SELECT lockstep.generation_increment(?, ARRAY['primary'])", resource);
            refused("sync from it", "SELECT lockstep.replica_sync_begin(?, 'copy', 'third', source => 'primary')", resource);
        }

        void jobs() throws SQLException {
            String queue = "own " + number;
            String claim = "SELECT job_id, token FROM lockstep.job_claim(?, ?, ttl => ?::interval)";
            String complete = "SELECT lockstep.job_complete(?, ?)";
            execute("SELECT lockstep.job_enqueue(?, 'key', 'greet')", queue);
            Object[] first = row(claim, queue, "first", "1 microsecond");
            Object[] second = row(claim, queue, "second", "1 minute");
            refused("job guard", "SELECT lockstep.job_guard(?, ?)", first);
            record("job of the first worker", value(complete, first));
            record("job of the second worker", value(complete, second));
            for (int n = 0; n < 3; n++) {
                String name = number + "." + n;
                execute("SELECT lockstep.job_enqueue('shared', ?, 'greet', ?::jsonb)", name, "{\"name\": \"" + name + "\"}");
            }
            String next = "SELECT job_id, token, payload ->> 'name' FROM lockstep.job_claim('shared', ?)";
            for (Object[] found; (found = row(next, "client " + number)) != null; ) {
                Object[] job = found;
                transaction(() -> {
                    execute("INSERT INTO greeted VALUES (?)", job[2]);
                    check(value(complete, job[0], job[1]).equals("completed"));
                });
            }
        }

        Void work() throws Exception {
            pushes();
            projection();
            lease();
            sync();
            jobs();
            connection.close();
            return null;
        }
    }

    static void check(boolean truth) {
        if (!truth) {
            throw new IllegalStateException();
        }
    }

    static void push(Client client, String aggregate) throws SQLException {
        client.execute("SELECT lockstep.push_event('race', ?, 'ran')", aggregate);
    }

    static String retried(SQLException error) throws SQLException {
        if (!RETRY.contains(error.getSQLState())) {
            throw error;
        }
        return error.getSQLState();
    }

    static void serializable(Client one, Client other, boolean disturbed) throws SQLException {
        one.transaction(() -> {
            one.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE");
            one.execute("SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')");
            if (disturbed) {
                push(other, "serializable");
            }
            push(one, "serializable");
        });
    }

    static Void second(Client client, String aggregate) throws SQLException {
        try {
            push(client, aggregate);
            client.execute("COMMIT");
        } catch (SQLException error) {
            client.execute("ROLLBACK");
            client.record("opposite orders", retried(error));
            client.transaction(() -> { // all of it again
                push(client, "a");
                push(client, "b");
            });
        }
        return null;
    }

    /** Two sessions in each other's way: what to try again. */
    static void races() throws Exception {
        Client one = new Client(0);
        Client other = new Client(0);
        try {
            serializable(one, other, true);
        } catch (SQLException error) {
            other.record("serializable", retried(error));
            serializable(one, other, false);
        }

        String claim = "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)";
        String[] busy = {"accepted"};
        one.transaction(() -> {
            one.execute(claim);
            try {
                other.transaction(() -> {
                    other.execute("SET LOCAL lock_timeout = '10ms'");
                    other.execute(claim);
                });
            } catch (SQLException error) {
                busy[0] = retried(error);
            }
        });
        other.record("wait for a claim", busy[0]);
        other.execute(claim);

        one.execute("BEGIN");
        push(one, "a");
        other.execute("BEGIN");
        push(other, "b");
        together(List.of(() -> second(one, "b"), () -> second(other, "a")));
    }

    static void together(List<Callable<Void>> tasks) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(tasks.size());
        List<Future<Void>> running = threads.invokeAll(tasks);
        threads.shutdown();
        for (Future<Void> task : running) {
            task.get();
        }
    }

    /** What becomes of the position of a batch's last event that was made a float. */
    static void floats(int batch) throws SQLException {
        Client client = new Client(0);
        client.connection.setAutoCommit(false);
        BigDecimal position = (BigDecimal) client.value(
            "SELECT max(position) FROM lockstep.projection_claim('balances', max_events => ?)", batch);
        String[][] queries = {
            {"advance", "SELECT lockstep.projection_advance('balances', up_to => ?)::text"},
            {"read", "SELECT count(*)::text FROM lockstep.read_events(after => ?)"},
        };
        for (String[] query : queries) {
            var savepoint = client.connection.setSavepoint();
            Object outcome;
            try {
                outcome = client.value(query[1], position.doubleValue());
            } catch (SQLException error) {
                outcome = error.getSQLState();
            }
            client.connection.rollback(savepoint);
            System.out.println(query[0] + " " + outcome);
        }
        client.connection.rollback();
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments[0].equals("floats")) {
            floats(Integer.parseInt(arguments[1]));
            return;
        }
        List<Callable<Void>> clients = new ArrayList<>();
        for (int n = 1; n <= Integer.parseInt(arguments[0]); n++) {
            Client client = new Client(n);
            clients.add(client::work);
        }
        together(clients);
        races();
    }
}
