package upstream

import (
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
)

// What upstreams answer never panics, and is bounded.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte{10, 11, 'e', 'x', 'a', 'm', 'p', 'l', 'e', '.', 'o', 'r', 'g'})
	f.Fuzz(func(t *testing.T, data []byte) {
		if certs, err := parsePEM(string(data), string(data)); err == nil {
			chain, roots := split(certs)
			if len(certs) > maxCerts || len(chain)+len(roots) != len(certs) {
				t.Errorf("%d certificates, %d and %d", len(certs), len(chain), len(roots))
			}
		}
		_, _ = parseDER([][]byte{data})
		_, _ = parseKey(data)
		var w types.Bundle
		if proto.Unmarshal(data, &w) == nil {
			_, _ = fromWire(&w)
		}
	})
}
