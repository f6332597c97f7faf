// A js-libp2p peer for the tests of interop: TCP, Noise, Yamux, identify, ping, echo, Kademlia.
//
// It prints one line of JSON with its address, then answers each line of JSON on stdin with one on stdout. It
// lies beside the tests and is copied next to the installed packages, since node looks for them there.

import { createInterface } from 'node:readline'

Promise.withResolvers ??= () => { // which Node has from 22 on
  const made = {}
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }))
  return made
}

const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { dcutr } = await import('@libp2p/dcutr')
const { autoNATv2 } = await import('@libp2p/autonat-v2')
const { Message: AutoNAT } = await import('./node_modules/@libp2p/autonat-v2/dist/src/pb/index.js')
const { pbStream } = await import('@libp2p/utils')
const { multiaddr } = await import('@multiformats/multiaddr')
const { peerIdFromString } = await import('@libp2p/peer-id')

const ECHO = '/test/echo/1'
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    ping: ping(),
    dcutr: dcutr(),
    autonat: autoNATv2(),
    dht: kadDHT({ protocol: '/ipfs/kad/1.0.0', clientMode: false, peerInfoMapper: passthroughMapper })
  }
})

async function say (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}

async function echoBack (stream) {
  for await (const chunk of stream) await say(stream, chunk.subarray())
  await stream.close()
}

async function echo (peer, size) {
  const stream = await node.dialProtocol(peerIdFromString(peer), ECHO)
  const sent = new Uint8Array(size).map((_, index) => index % 251)
  const back = (async () => {
    const got = []
    let left = size
    for await (const chunk of stream) {
      got.push(chunk.subarray())
      left -= chunk.byteLength
      if (left <= 0) break
    }
    return Buffer.concat(got)
  })()
  for (let at = 0; at < size; at += 65536) await say(stream, sent.subarray(at, at + 65536))
  const equal = Buffer.compare(await back, Buffer.from(sent)) === 0
  await stream.close()
  return equal
}

async function askToDial (peer, address) {
  const stream = await node.dialProtocol(peerIdFromString(peer), '/libp2p/autonat/2/dial-request')
  const messages = pbStream(stream).pb(AutoNAT)
  await messages.write({ dialRequest: { addrs: [multiaddr(address).bytes], nonce: 7n } })
  const { dialResponse } = await messages.read()
  return dialResponse.status
}

const commands = {
  askToDial: async ({ peer, address }) => await askToDial(peer, address),
  dial: async ({ address }) => String((await node.dial(multiaddr(address))).remotePeer),
  identify: async ({ peer }) => {
    const connection = node.getConnections(peerIdFromString(peer))[0]
    return (await node.services.identify.identify(connection)).protocols
  },
  ping: async ({ peer }) => await node.services.ping.ping(peerIdFromString(peer)),
  echo: async ({ peer, size }) => await echo(peer, size),
  find: async ({ peer }) => {
    const found = await node.peerRouting.findPeer(peerIdFromString(peer), { signal: AbortSignal.timeout(20000) })
    return found.multiaddrs.map(String)
  },
  knows: async ({ peer }) => node.services.dht.routingTable.find
    ? (await node.services.dht.routingTable.find(peerIdFromString(peer))) !== undefined
    : node.services.dht.routingTable.size > 0
}

await node.handle(ECHO, async (first, second) => await echoBack(second === undefined ? first : (first.stream ?? first)))
console.log(JSON.stringify({ address: String(node.getMultiaddrs()[0]) }))
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...told } = JSON.parse(line)
  try {
    console.log(JSON.stringify({ value: await commands[command](told) }))
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.stack ?? error) }))
  }
}
await node.stop()
process.exit(0)
