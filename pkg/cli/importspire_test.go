package cli

import "testing"

func FuzzRegistrationsParse(f *testing.F) {
	f.Add([]byte(`{"entries":[{"id":"x","spiffe_id":{"trust_domain":"a","path":"/b"}}]}`))
	f.Add([]byte(`{"bundles":[{"trust_domain":"a"}]}`))
	f.Add([]byte(`{"federation_relationships":[{"trust_domain":"a","https_web":{}}]}`))
	f.Add([]byte("****\n* other.org\n****\n{\"keys\":[]}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r registrations
		if r.parse(data) == nil {
			r.separateBundles()
			for _, e := range r.entries {
				sameSubject(e, e)
			}
		}
	})
}
