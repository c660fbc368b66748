// The scenario with pgx. Other languages' programs beside it do the same: see ../test_scenario.py.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgtype"
	"github.com/jackc/pgx/v4"
)

var background = context.Background()

// What goes away when the whole transaction is tried again, as it is.
var retry = map[string]bool{"40001": true, "40P01": true, "55P03": true}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func check(truth bool) {
	if !truth {
		panic("this is not as it should be")
	}
}

// The server's error, or one without a code.
func answer(err error) *pgconn.PgError {
	var found *pgconn.PgError
	if errors.As(err, &found) {
		return found
	}
	return &pgconn.PgError{}
}

func connect() *pgx.Conn {
	config, err := pgx.ParseConfig("") // PGHOST, PGDATABASE and the like say where
	must(err)
	// No prepared statements: PgBouncer may give each transaction another session.
	config.PreferSimpleProtocol = true
	connection, err := pgx.ConnectConfig(background, config)
	must(err)
	return connection
}

type client struct {
	number     int
	connection *pgx.Conn
}

func (c *client) execute(query string, parameters ...interface{}) error {
	_, err := c.connection.Exec(background, query, parameters...)
	return err
}

// Reads one row.
func (c *client) row(query string, parameters []interface{}, columns ...interface{}) error {
	return c.connection.QueryRow(background, query, parameters...).Scan(columns...)
}

func (c *client) text(query string, parameters ...interface{}) (value string) {
	must(c.row(query, parameters, &value))
	return value
}

func (c *client) transaction(body func() error) error {
	return c.connection.BeginFunc(background, func(pgx.Tx) error { return body() })
}

func (c *client) record(what string, outcome string) {
	must(c.execute("INSERT INTO outcomes VALUES ($1, $2, $3)", c.number, what, outcome))
}

// Records the SQLSTATE of what must fail.
func (c *client) refused(what string, err error) {
	if err == nil {
		c.record(what, "accepted")
	} else {
		c.record(what, answer(err).Code)
	}
}

// A deposit, once, however often it is pushed: it has an id of its own.
func (c *client) push(account string, expectedSequence int64, event int) error {
	deposit, err := json.Marshal([]map[string]interface{}{{
		"aggregate_type":    "account",
		"aggregate_id":      account,
		"event_type":        "deposited",
		"event_id":          fmt.Sprintf("00000000-0000-4000-8000-%06d%06d", c.number, event),
		"expected_sequence": expectedSequence,
		"payload":           map[string]int{"amount": 10*c.number + event},
	}})
	must(err)
	return c.execute("SELECT position, sequence FROM lockstep.push_events($1)", string(deposit)) // JSON as text: bytes would be a bytea
}

func (c *client) sequence(account string) (sequence int64) {
	query := "SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', $1)"
	must(c.row(query, []interface{}{account}, &sequence))
	return sequence
}

func (c *client) pushes() {
	own := fmt.Sprintf("own %d", c.number)
	must(c.push(own, 0, 1))
	// The answer to a push is lost with the connection: connect and push the same again.
	if err := c.execute("SELECT pg_terminate_backend(pg_backend_pid())"); err != nil {
		c.connection = connect()
	}
	if err := c.push(own, 0, 1); err != nil {
		if answer(err).ConstraintName != "events_tenant_event_id_key" {
			panic(err)
		}
		c.record("the same push again", answer(err).Code)
	}
	// Somebody was faster: read, decide, push again.
	if err := c.push(own, 0, 2); err != nil {
		if answer(err).Code != "LS001" {
			panic(err)
		}
		c.record("push", answer(err).Code)
		must(c.push(own, c.sequence(own), 2))
	}
	for {
		err := c.push("shared", c.sequence("shared"), 3)
		if err == nil {
			break
		}
		if answer(err).Code != "LS001" {
			panic(err)
		}
	}
}

type event struct {
	position pgtype.Numeric
	account  string
	payload  struct{ Amount int }
}

// Within a transaction: the events of a batch, applied, and whether there are more.
func (c *client) claimAndApply() (events []event, more bool) {
	rows, err := c.connection.Query(background,
		"SELECT position, aggregate_id, payload FROM lockstep.projection_claim('balances', max_events => 3, wait => true)")
	must(err)
	for rows.Next() {
		var found event
		must(rows.Scan(&found.position, &found.account, &found.payload))
		events = append(events, found)
	}
	must(rows.Err())
	for _, found := range events {
		must(c.execute("INSERT INTO applied VALUES ($1)", &found.position))
		must(c.execute(`INSERT INTO balances AS b VALUES ($1, $2)
			ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total`, found.account, found.payload.Amount))
	}
	must(c.row("SELECT more FROM lockstep.projection_claim_state('balances')", nil, &more))
	return events, more
}

func (c *client) projection() {
	c.refused("advance without a claim", c.execute("SELECT lockstep.projection_advance('balances')"))
	dies, err := c.connection.Begin(background)
	must(err)
	c.claimAndApply()
	must(dies.Rollback(background)) // all of this comes again
	for more := true; more; {
		must(c.transaction(func() error {
			var events []event
			events, more = c.claimAndApply()
			if len(events) == 0 {
				return nil
			}
			var at pgtype.Numeric // exact, as is string
			last := &events[len(events)-1].position
			err := c.row("SELECT lockstep.projection_advance('balances', up_to => $1)", []interface{}{last}, &at)
			if err == nil {
				check(at.Int.Cmp(last.Int) == 0 && at.Exp == last.Exp)
			}
			return err
		}))
	}
}

func (c *client) lease() {
	acquired, token := false, new(int64)
	for !acquired {
		query := "SELECT acquired, token FROM lockstep.lease_acquire('leader', $1, ttl => $2)"
		must(c.row(query, []interface{}{fmt.Sprintf("client %d", c.number), "600 seconds"}, &acquired, &token))
		if !acquired {
			time.Sleep(10 * time.Millisecond)
		}
	}
	must(c.transaction(func() error {
		if err := c.execute("SELECT lockstep.lease_guard('leader', $1)", *token); err != nil {
			return err
		}
		return c.execute("INSERT INTO led VALUES ($1, $2)", c.number, *token)
	}))
	var released bool
	must(c.row("SELECT lockstep.lease_release('leader', $1)", []interface{}{*token}, &released))
	check(released)
	// From here on it is a former holder.
	c.refused("guard", c.execute("SELECT lockstep.lease_guard('leader', $1)", *token))
	c.refused("guard at commit", c.transaction(func() error {
		if err := c.execute("INSERT INTO led VALUES ($1, NULL)", c.number); err != nil {
			return err
		}
		return c.execute("SELECT lockstep.lease_guard_at_commit('leader', $1)", *token)
	}))
}

func (c *client) sync() {
	resource := fmt.Sprintf("repository %d", c.number)
	var status string
	var lost, token int64
	begin := "SELECT status, token FROM lockstep.replica_sync_begin($1, 'copy', $2, ttl => $3)"
	finish := "SELECT lockstep.replica_sync_finish($1, 'copy', $2)"
	must(c.execute("SELECT lockstep.resource_create($1, ARRAY['primary'])", resource))
	must(c.row(begin, []interface{}{resource, "first", "1 microsecond"}, &status, &lost))
	check(status == "started")
	must(c.row(begin, []interface{}{resource, "second", "1 minute"}, &status, &token))
	check(status == "started")
	c.record("sync of the first worker", c.text(finish, resource, lost))
	c.record("sync of the second worker", c.text(finish, resource, token))
	c.refused("copy to a current one", c.execute("SELECT lockstep.generation_replicated($1, 'primary', 'copy')", resource))
	must(c.execute("SELECT lockstep.generation_increment($1)", resource)) // the truth lives elsewhere: both are outdated
	c.refused("write", c.execute("SELECT lockstep.generation_increment($1, ARRAY['primary'])", resource))
	c.refused("sync from it", c.execute("SELECT lockstep.replica_sync_begin($1, 'copy', 'third', source => 'primary')", resource))
}

func (c *client) jobs() {
	queue := fmt.Sprintf("own %d", c.number)
	var job, stale, token int64
	claim := "SELECT job_id, token FROM lockstep.job_claim($1, $2, ttl => $3)"
	complete := "SELECT lockstep.job_complete($1, $2)"
	must(c.execute("SELECT lockstep.job_enqueue($1, 'key', 'greet')", queue))
	must(c.row(claim, []interface{}{queue, "first", "1 microsecond"}, &job, &stale))
	must(c.row(claim, []interface{}{queue, "second", "1 minute"}, &job, &token))
	c.refused("job guard", c.execute("SELECT lockstep.job_guard($1, $2)", job, stale))
	c.record("job of the first worker", c.text(complete, job, stale))
	c.record("job of the second worker", c.text(complete, job, token))
	for n := 0; n < 3; n++ {
		name := fmt.Sprintf("%d.%d", c.number, n)
		payload := fmt.Sprintf(`{"name": %q}`, name)
		must(c.execute("SELECT lockstep.job_enqueue('shared', $1, 'greet', $2)", name, payload))
	}
	for {
		var payload struct{ Name string }
		next := "SELECT job_id, token, payload FROM lockstep.job_claim('shared', $1)"
		err := c.row(next, []interface{}{fmt.Sprintf("client %d", c.number)}, &job, &token, &payload)
		if errors.Is(err, pgx.ErrNoRows) {
			return
		}
		must(err)
		must(c.transaction(func() error {
			err := c.execute("INSERT INTO greeted VALUES ($1)", payload.Name)
			if err == nil {
				check(c.text(complete, job, token) == "completed")
			}
			return err
		}))
	}
}

func work(number int) {
	c := &client{number, connect()}
	c.pushes()
	c.projection()
	c.lease()
	c.sync()
	c.jobs()
	must(c.connection.Close(background))
}

func push(c *client, aggregate string) error {
	return c.execute("SELECT lockstep.push_event('race', $1, 'ran')", aggregate)
}

func retried(err error) string {
	if !retry[answer(err).Code] {
		panic(err)
	}
	return answer(err).Code
}

// Two sessions in each other's way: what to try again.
func races() {
	one, other := &client{0, connect()}, &client{0, connect()}

	serializable := func(disturbed bool) error {
		options := pgx.TxOptions{IsoLevel: pgx.Serializable}
		return one.connection.BeginTxFunc(background, options, func(pgx.Tx) error {
			must(one.execute("SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')"))
			if disturbed {
				must(push(other, "serializable"))
			}
			return push(one, "serializable")
		})
	}
	if err := serializable(true); err != nil {
		other.record("serializable", retried(err))
		must(serializable(false))
	}

	claim := "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)"
	var busy error
	must(one.transaction(func() error {
		must(one.execute(claim))
		busy = other.transaction(func() error {
			must(other.execute("SET LOCAL lock_timeout = '10ms'"))
			return other.execute(claim)
		})
		return nil
	}))
	if busy != nil {
		other.record("wait for a claim", retried(busy))
		must(other.execute(claim))
	}

	must(one.execute("BEGIN"))
	must(push(one, "a"))
	must(other.execute("BEGIN"))
	must(push(other, "b"))
	second := func(c *client, aggregate string) {
		if err := push(c, aggregate); err != nil {
			must(c.execute("ROLLBACK"))
			c.record("opposite orders", retried(err))
			must(c.transaction(func() error { // all of it again
				must(push(c, "a"))
				return push(c, "b")
			}))
		} else {
			must(c.execute("COMMIT"))
		}
	}
	together(func() { second(one, "b") }, func() { second(other, "a") })
}

func together(tasks ...func()) {
	var running sync.WaitGroup
	for _, task := range tasks {
		task := task
		running.Add(1)
		go func() {
			defer running.Done()
			task()
		}()
	}
	running.Wait()
}

// What becomes of the position of a batch's last event that was made a float.
func floats(batch int) {
	c := &client{0, connect()}
	must(c.execute("BEGIN"))
	var position pgtype.Numeric
	var float float64
	claim := "SELECT max(position) FROM lockstep.projection_claim('balances', max_events => $1)"
	must(c.row(claim, []interface{}{batch}, &position))
	must(position.AssignTo(&float))
	for _, query := range [][2]string{
		{"advance", "SELECT lockstep.projection_advance('balances', up_to => $1)::text"},
		{"read", "SELECT count(*)::text FROM lockstep.read_events(after => $1)"},
	} {
		must(c.execute("SAVEPOINT s"))
		var outcome string
		if err := c.row(query[1], []interface{}{float}, &outcome); err != nil {
			outcome = answer(err).Code
		}
		must(c.execute("ROLLBACK TO s"))
		fmt.Println(query[0], outcome)
	}
}

func main() {
	number, err := strconv.Atoi(os.Args[len(os.Args)-1])
	must(err)
	if os.Args[1] == "floats" {
		floats(number)
		return
	}
	var tasks []func()
	for n := 1; n <= number; n++ {
		n := n
		tasks = append(tasks, func() { work(n) })
	}
	together(tasks...)
	races()
}
