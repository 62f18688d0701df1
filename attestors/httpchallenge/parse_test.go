package httpchallenge

import (
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What is taken makes a URL of that host and path, and a SPIFFE ID.
func FuzzPayload(f *testing.F) {
	f.Add([]byte(`{"hostname":"p1.example.org","agentname":"default","port":80}`))
	f.Add([]byte(`{"hostname":"p1.example.org@x","agentname":"..","port":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parsePayload(data)
		if err != nil {
			return
		}
		u, err := url.Parse("http://" + p.HostName + path(p.AgentName))
		if err != nil || u.Host != p.HostName || u.RawQuery != "" || u.User != nil || strings.Count(u.Path, "/") != 6 {
			t.Errorf("%q makes %v, %v", data, u, err)
		}
		if err := spiffeid.ValidatePath("/spire/agent/" + Name + "/" + p.HostName); err != nil {
			t.Errorf("%q: %v", data, err)
		}
	})
}
