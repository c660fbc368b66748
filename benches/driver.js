// Loads a server through a peer's Node library; prints what it did as JSON. All peers are run by these loops, in one process.
//   driver.js PEER create
//   driver.js PEER append CLIENTS SECONDS BYTES HOT   one event a transaction; HOT 1: all to one aggregate, repeated until it is taken
//   driver.js PEER consume CONSUMERS POLL SIZE        consumers that poll (milliseconds) until standard input ends
//   driver.js PEER catchup CONSUMERS SIZE EVENTS      until each has been passed so many events
//   driver.js PEER fill COUNT | enqueue CLIENTS SECONDS | work WORKERS SECONDS     a queue; the work is nothing
const WARM_UP = 1000;
const [program, verb, ...rest] = process.argv.slice(2);
const [first, second, third, fourth] = rest.map(Number);

const now = () => performance.now();
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const together = (count, run) => Promise.all(Array.from({ length: count }, (_, number) => run(number)));

// As payload() in peers/__init__.py.
function payload(size) {
    const order = { amount: 1250, currency: "EUR", customer: "c-7391", text: "" };
    const bare = JSON.stringify(order).length + 7; // Python puts a space after each colon and comma
    let text = "";
    for (let n = 0; text.length < size; n += 1) {
        text += ((BigInt(n) * 2654435761n) % 4294967296n).toString(16).padStart(8, "0");
    }
    return { ...order, text: text.slice(0, Math.max(0, size - bare)) };
}

// Repeats step(n), which tells how many attempts failed, for the warm-up and the window.
async function timed(clients, seconds, step) {
    const opened = now() + WARM_UP;
    const closed = opened + seconds * 1000;
    let counted = 0, count = 0, failed = 0;
    await together(clients, async (client) => {
        for (let n = 0; now() < closed; n += 1) {
            failed += (await step(client, n)) ?? 0;
            count += 1;
            counted += now() >= opened && now() < closed ? 1 : 0;
        }
    });
    return { rate: counted / seconds, count, failed, seconds };
}

const verbs = {
    create: async () => ({ rate: 0, count: 0 }),

    append(peer) {
        const data = payload(third);
        return timed(first, second, (client, n) => (
            fourth ? peer.appendHot(data) : peer.append(`${process.pid}-${client}-${Math.floor(n / 10)}`, n % 10 + 1, data)
        ));
    },

    async consume(peer) {
        let stopping = false;
        process.stdin.on("end", () => { stopping = true; }).resume();
        await together(first, (number) => peer.consume(number + 1, third, second, () => stopping));
        return {};
    },

    async catchup(peer) {
        const begun = now();
        let count = 0;
        await together(first, async (number) => {
            let passed = 0;
            await peer.consume(number + 1, second, 1, (events) => {
                passed += events;
                count += events;
                return passed >= third;
            });
        });
        const seconds = (now() - begun) / 1000;
        return { rate: count / seconds, count, seconds };
    },

    async fill(peer) {
        await peer.fill(first);
        return { rate: 0, count: first };
    },

    enqueue: (peer) => timed(first, second, (client, n) => peer.enqueue(`new ${process.pid} ${client} ${n}`)),

    async work(peer) {
        const state = { done: 0, until: now() + WARM_UP + second * 1000 };
        let atOpening = 0, atClosing = 0;
        setTimeout(() => { atOpening = state.done; }, WARM_UP);
        setTimeout(() => { atClosing = state.done; }, WARM_UP + second * 1000);
        await peer.work(first, state, () => now() < state.until);
        await sleep(Math.max(0, state.until - now()) + 20);
        return { rate: (atClosing - atOpening) / second, count: state.done, seconds: second };
    },
};

async function main() {
    const peer = await require(`./peers/${program}.js`)({ sleep });
    console.log(JSON.stringify(await verbs[verb](peer)));
    await peer.end();
    process.exit(0);
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
