"""An issuer of tokens, as far as its keys go. Arguments: where to listen, the file of keys, certificate, key."""

import http.server
import ssl
import sys

ADDRESS, KEYS, CERTIFICATE, KEY = sys.argv[1:]


class Issuer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/jwks.json")
            self.end_headers()
            return
        with open(KEYS, "rb") as keys:
            body = keys.read()
        self.send_response(200 if self.path == "/jwks.json" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


host, port = ADDRESS.rsplit(":", 1)
server = http.server.ThreadingHTTPServer((host, int(port)), Issuer)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(CERTIFICATE, KEY)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
