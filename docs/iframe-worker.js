// The search runs in a worker, and browsers start none for a page that was opened as a file. Such a page gets this one,
// which runs the worker's script in a hidden frame. The plugin `offline` would else load another from another host.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const scope = frame.contentWindow;
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded = new Promise((resolve) => {
        const script = scope.document.createElement("script");
        script.src = url;
        script.onload = resolve;
        scope.document.body.append(script);
      });
      this.postMessage = (data) =>
        this.loaded.then(() => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
      this.terminate = () => frame.remove();
    }
  };
