package azureimds

import (
	"encoding/json"
	"testing"
)

// FuzzAnswers feeds the readers of what Azure signs and answers.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"nonce":"1","subscriptionId":"d5b40d61-272e-48da-beb9-05f295c42bd6","timeStamp":{"createdOn":"11/20/18 22:07:39 -0000","expiresOn":"11/20/18 22:08:24 -0000"},"vmId":"aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"}`))
	f.Add([]byte(`{"access_token": "a.b.c", "expires_in": "3599"}`))
	f.Add([]byte(`{"id": "/x", "tags": {"a": 1}, "scaleSet": "/providers/Microsoft.Compute/virtualMachineScaleSets/x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := parseDocument(data); err == nil && (!guidForm.MatchString(d.VMID) || !guidForm.MatchString(d.SubscriptionID)) {
			t.Errorf("took %q for a document", data)
		}
		if token, life, err := parseToken(data); err == nil && (token == "" || life <= 0) {
			t.Errorf("took %q for a token", data)
		}
		var m machine
		if json.Unmarshal(data, &m) == nil {
			_ = json.Unmarshal(data, &m.interfaces)
			m.selectors([]string{"a"})
		}
	})
}
