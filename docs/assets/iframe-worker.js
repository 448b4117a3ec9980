// Browsers start no worker for a page that was opened from a folder. Search then runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>
        function importScripts() {
          const load = (all, url) => all.then(() => new Promise((done, failed) => {
            const script = document.createElement("script")
            Object.assign(script, { src: url, onload: done, onerror: failed })
            document.body.appendChild(script)
          }))
          return Array.from(arguments).reduce(load, Promise.resolve())
        }
      </script><body></body>`
      document.body.appendChild(frame)
      frame.onload = () => {
        const inside = frame.contentWindow
        inside.postMessage = (data) => {
          const message = new MessageEvent("message", { data })
          this.dispatchEvent(message)
          if (this.onmessage) this.onmessage(message)
        }
        inside.importScripts(url).then(() => {
          this.inside = inside
          this.waiting.splice(0).forEach((data) => this.postMessage(data))
        })
      }
    }
    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }
    terminate() {}
  }
}
