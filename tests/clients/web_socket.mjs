// Talks to a stream by the WebSocket that Node and browsers have, and prints its lines and how it was closed:
// `node --experimental-websocket web_socket.mjs URL IMAGE` (base64), from Node 20.10 on. Node 22 needs no option.

const [url, image] = process.argv.slice(2)
const socket = new WebSocket(url)
socket.onmessage = ({ data }) => {
  console.log(data)
  if ('stream' in JSON.parse(data)) {
    socket.send(JSON.stringify({ image }))
    socket.send('{"end": true}')
  }
}
socket.onclose = ({ code }) => console.log(code)
